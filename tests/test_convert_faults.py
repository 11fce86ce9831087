"""convert_hf.py where something is wrong: one error that names it, and nothing left behind."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf
import shards
from convert_hf import export_checkpoint, import_checkpoint, main
from hf_folders import (
    ROOT,
    all_tensors,
    edit_tensors,
    hugging_face_folder,
    mxfp4_folder,
    same_bits,
    training_run,
)


def break_several(folder):
    def change(tensors):
        del tensors["model.layers.1.self_attn.sinks"]
        tensors["model.layers.7.self_attn.sinks"] = torch.zeros(6)
        tensors["lm_head.weight"] = torch.zeros(96, 32)
        tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.uint8)
        tensors["model.layers.0.self_attn.sinks"] = torch.zeros(6, dtype=torch.int64)

    edit_tensors(folder, change)


def break_down_proj(folder):
    def change(tensors):
        name = "model.layers.0.mlp.experts.down_proj"
        tensors[name] = tensors[name].mT.contiguous()

    edit_tensors(folder, change)


def truncate(folder):
    path = next(iter(sorted(folder.glob("*.safetensors"))))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def no_safetensors(folder):
    sorted(folder.glob("*.safetensors"))[1].write_bytes(b"\x80\x04pickled")


def edit_index(folder, shard):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def path_traversal(folder):
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "outside.safetensors")
    edit_index(folder, "../outside.safetensors")


def pickle_in_index(folder):
    edit_index(folder, "pytorch_model.bin")


def lost_shard(folder):
    sorted(folder.glob("*.safetensors"))[2].unlink()


def no_config(folder):
    (folder / "config.json").unlink()


def no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def four_bits(folder):
    """As bitsandbytes stores them: thousands of tensors that nobody asked for."""
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    many_tensors(folder)


def many_layers(folder):
    edit_config(folder, num_hidden_layers=20_000, layer_types=None)


def many_layers_without_an_index(folder):
    edit_tensors(folder, lambda tensors: None)  # one file
    many_layers(folder)


def many_tensors(folder):
    extra = {f"model.layers.0.self_attn.absmax.{i}": torch.zeros(1) for i in range(2_000)}
    edit_tensors(folder, lambda tensors: tensors.update(extra))


def extra_copy(folder):
    """A name in two shards: which one counts?"""
    for path in sorted(folder.glob("*.safetensors"))[:2]:
        save_file(load_file(path) | {"model.norm.weight": torch.zeros(32)}, path)


FAILURES = [
    (break_several, ["missing: model.layers.1.self_attn.sinks", "5 problems",
                     "unknown: model.layers.7.self_attn.sinks", "lm_head.weight has shape (96, 32)",
                     "model.norm.weight has dtype U8",
                     "model.layers.0.self_attn.sinks has dtype I64"]),
    (break_down_proj, ["model.layers.0.mlp.experts.down_proj has shape (4, 32, 64)", "1 problems"]),
    (truncate, ["00001-of-", "is unreadable: missing, truncated or no safetensors file"]),
    (no_safetensors, ["00002-of-", "is unreadable"]),
    (path_traversal, ["model.safetensors.index.json", "leads out of the folder"]),
    (pickle_in_index, ["pytorch_model.bin is unreadable"]),
    (lost_shard, ["model-00003-of-", "is unreadable"]),
    (no_config, ["config.json"]),
    (no_weights, ["no tensors in safetensors files"]),
    (extra_copy, ["model.norm.weight is in model-00002-of-"]),
    (four_bits, ["config.json: quant_method is 'bitsandbytes'"]),
    (many_layers, ["it speaks of 20000 layers, and there are "]),
    (many_layers_without_an_index, ["it speaks of 20000 layers, and there are "]),
    (many_tensors, ["2000 problems", "and 1990 more"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return hugging_face_folder(tmp_path_factory.mktemp("whole") / "source")


@pytest.mark.parametrize(
    "breakage, messages", FAILURES, ids=[breakage.__name__ for breakage, _ in FAILURES]
)
def test_a_broken_source_is_one_error_and_leaves_nothing(tmp_path, whole, breakage, messages):
    source, work = tmp_path / "source", tmp_path / "work"
    shutil.copytree(whole, source)
    work.mkdir()
    breakage(source)
    with pytest.raises(SystemExit) as error:
        main([str(source), "--out", str(work / "ours")])
    assert str(error.value).startswith("error: ") and all(
        message in str(error.value) for message in messages
    )
    assert len(str(error.value)) < 3000
    assert list(work.iterdir()) == []


def test_a_crash_half_way_leaves_nothing(tmp_path, whole, monkeypatch):
    written, write = [], shards.Place.write

    def crash(place, start, tensor):
        written.append(place.path)
        assert place.path.exists() and place.path.parent.name != "ours"
        if len(written) >= 5:  # threads append: a length may be skipped
            raise KeyboardInterrupt
        return write(place, start, tensor)

    monkeypatch.setattr(shards.Place, "write", crash)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(str(whole), tmp_path / "ours")
    assert len(written) >= 5 and list(tmp_path.iterdir()) == []


def test_an_occupied_folder_is_left_alone(tmp_path, whole):
    for out in tmp_path / "folder", tmp_path / "file":
        if out.name == "folder":
            out.mkdir()
            (out / "precious").write_text("mine")
        else:
            out.write_text("mine")
        with pytest.raises(SystemExit, match="not empty: remove it, or choose another --out"):
            main([str(whole), "--out", str(out)])
    assert (tmp_path / "folder" / "precious").read_text() == "mine" and len(
        list(tmp_path.iterdir())
    ) == 2
    (tmp_path / "empty").mkdir()
    main([str(whole), "--out", str(tmp_path / "empty")])
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize("source", ["no/such/folder", "./nowhere", "/nowhere", "nowhere"])
def test_a_source_that_is_neither_folder_nor_hub_name(tmp_path, source):
    with pytest.raises(SystemExit, match="no such folder, and no name on the Hub"):
        main([source, "--out", str(tmp_path / "ours")])


def test_exporting_a_run_that_has_not_ended(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="this run has no model/ yet"):
        export_checkpoint(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importing_a_converted_folder_and_exporting_a_foreign_one(tmp_path, whole):
    import_checkpoint(str(whole), tmp_path / "ours")
    with pytest.raises(ValueError, match="is it converted already"):
        import_checkpoint(str(tmp_path / "ours"), tmp_path / "again")
    with pytest.raises(ValueError, match="no checkpoint of ours"):
        export_checkpoint(whole, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_packed_needs_a_packed_source(tmp_path, whole):
    with pytest.raises(SystemExit, match="source: its experts are not in MXFP4: .* --packed"):
        main([str(whole), "--out", str(tmp_path / "ours"), "--packed"])
    assert list(tmp_path.iterdir()) == []


def test_mxfp4_refuses_what_it_cannot_hold(tmp_path):
    run = training_run(tmp_path / "run", hidden_size=48)
    with pytest.raises(ValueError, match="multiple of 32 inputs, .* has 48: .*without --mxfp4"):
        export_checkpoint(run, tmp_path / "out", mxfp4=True)
    run = training_run(tmp_path / "nan")
    path = next((run / "model").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["blocks.1.mlp.down_weight"][3, 2, 1] = math.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match="infinite"):
        export_checkpoint(run, tmp_path / "out", mxfp4=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "nan"}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "--export", "b", "--out", "c"],
        ["--export", "b"],
        ["a", "--mxfp4"],
        ["a", "--state=best"],
        ["--export", "b", "--out", "c", "--packed"],
    ],
)
def test_options_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


# --------------------------------------------------------------------------------------------------
# What changes while a conversion runs


def cut_to_half(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_in_the_last_byte(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    os.truncate(path, path.stat().st_size + 1)


@pytest.mark.parametrize("damage", [cut_to_half, cut_in_the_last_byte, lengthen, os.unlink])
@pytest.mark.parametrize("way", ["import", "export"])
def test_a_source_that_changes_while_it_is_read_is_never_published(
    damage, way, tmp_path, whole, monkeypatch
):
    """Between its headers and its tensors: what is missing must not become zeros."""
    source, work = tmp_path / "source", tmp_path / "work"
    if way == "import":
        shutil.copytree(whole, source)
    else:
        import_checkpoint(str(whole), source)
    work.mkdir()
    damaged, create = sorted(source.glob("*.safetensors"))[-1], convert_hf.create_shards

    def create_shards(*arguments):
        places = create(*arguments)
        damage(damaged)
        return places

    monkeypatch.setattr(convert_hf, "create_shards", create_shards)
    arguments = [str(source)] if way == "import" else ["--export", str(source)]
    with pytest.raises(SystemExit, match=rf"^error: .*{damaged.name}.*$") as error:
        main([*arguments, "--out", str(work / "out")])
    assert "\n" not in str(error.value) and list(work.iterdir()) == []


def test_a_disk_that_fails_is_one_error(tmp_path, whole, monkeypatch):
    def failing(path, mode="r", **options):
        if options.get("buffering") == 0:  # a tensor is read
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, mode, **options)

    monkeypatch.setattr(shards, "open", failing, raising=False)
    with pytest.raises(SystemExit, match="^error: cannot read .*: Input/output error$"):
        main([str(whole), "--out", str(tmp_path / "ours")])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_error(tmp_path, whole, monkeypatch):
    def full(path, mode="r", **options):
        return open("/dev/full" if mode == "r+b" else path, mode, **options)

    monkeypatch.setattr(shards, "open", full, raising=False)
    with pytest.raises(SystemExit, match="^error: cannot write .* GB free on its disk: No space"):
        main([str(whole), "--out", str(tmp_path / "ours")])
    assert list(tmp_path.iterdir()) == []


def test_of_two_conversions_to_one_folder_the_second_is_refused(tmp_path, whole, monkeypatch):
    """The second begins while the first writes. The result is the first one's, whole."""
    other, out, work = mxfp4_folder(tmp_path / "other", seed=1), tmp_path / "out", []
    convert = convert_hf.convert

    def convert_twice(jobs):
        monkeypatch.setattr(convert_hf, "convert", convert)
        with pytest.raises(SystemExit) as error:
            main([str(other), "--out", str(out)])
        work.append(str(error.value))
        return convert(jobs)

    monkeypatch.setattr(convert_hf, "convert", convert_twice)
    main([str(whole), "--out", str(out)])
    assert re.fullmatch(rf"error: {out} is being written by process {os.getpid()} .*", work[0])
    import_checkpoint(str(whole), tmp_path / "alone")
    both, alone = all_tensors(out), all_tensors(tmp_path / "alone")
    assert both.keys() == alone.keys() and all(same_bits(both[n], alone[n]) for n in both)
    assert {path.name for path in tmp_path.iterdir()} == {"other", "out", "alone"}


SLOW = """
import sys, time, convert_hf, shards
def write(place, start, tensor):
    print("writing", flush=True)
    time.sleep(2)
shards.Place.write = write
convert_hf.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_signals_leave_nothing(tmp_path, whole):
    """Ctrl-C, a scheduler's SIGTERM, a closed terminal."""
    sent = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
    command = [sys.executable, "-c", SLOW, str(whole), "--out"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        number: subprocess.Popen([*command, str(tmp_path / number.name)], cwd=ROOT, **pipes)
        for number in sent
    }
    for number, process in started.items():
        assert any(line == "writing\n" for line in process.stdout), process.stderr.read()
        process.send_signal(number)
    for number, process in started.items():
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == sent[number], errors
        assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_what_others_left_does_not_disturb(tmp_path, whole):
    """Working folders of another machine, of an older version and of a stranger stay."""
    left = [".ours.partial", ".ours.partial-12345678-12345678", "ours.partial-1", ".ours.partial-1"]
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model-00001-of-00001.safetensors").write_text("half")
    main([str(whole), "--out", str(tmp_path / "ours")])
    assert {path.name for path in tmp_path.iterdir()} == {*left, "ours"}
    assert all((tmp_path / name / "model-00001-of-00001.safetensors").exists() for name in left)


# --------------------------------------------------------------------------------------------------
# What is converted, with a word about it


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value, tmp_path, capsys):
    """They are what the source has: converted, named, and never called ready."""
    source = hugging_face_folder(tmp_path / "source")

    def change(tensors):
        tensors["model.layers.1.self_attn.k_proj.bias"][3] = value
        tensors["model.layers.2.mlp.experts.down_proj"][1, 2, 3] = value

    edit_tensors(source, change)
    main([str(source), "--out", str(tmp_path / "ours")])
    main(["--export", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    printed, errors = capsys.readouterr()
    assert "ready" not in printed and "ours is converted, as broken as its source" in printed
    named = "blocks.1.attention.qkv.bias\n  blocks.2.mlp.down_weight\n"
    assert "warning: 2 tensors hold NaN or infinite values, and a model with" in errors
    assert named in errors and "model.layers.1.self_attn.k_proj.bias\n" in errors
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert all(same_bits(before[name], after[name]) for name in before)


def test_an_mxfp4_scale_that_is_no_number(tmp_path, capsys):
    source = mxfp4_folder(tmp_path / "source")
    name = "model.layers.0.mlp.experts.gate_up_proj_scales"
    edit_tensors(source, lambda tensors: tensors[name][1, 2].fill_(255))
    main([str(source), "--out", str(tmp_path / "ours")])
    assert "values, and a model with them" in capsys.readouterr().err
    main([str(source), "--out", str(tmp_path / "packed"), "--packed"])
    assert "gate_up_weight_scales\n" in capsys.readouterr().err


def test_an_export_without_a_tokenizer_is_not_ready(tmp_path, capsys):
    """Nobody can use it for text."""
    run = training_run(tmp_path / "run")
    (run / "config.json").write_text('{"tokenizer": "o200k_harmony"}')
    main(["--export", str(run), "--out", str(tmp_path / "a")])
    printed = capsys.readouterr().out
    assert "ready" not in printed
    assert "a has the weights but no tokenizer (o200k_harmony): export again with" in printed


def test_keys_that_nothing_reads_are_named(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "source")
    edit_config(tmp_path / "source", unsloth_version="2025.8.1", attention_chunk_size=8192)
    main([str(tmp_path / "source"), "--out", str(tmp_path / "ours")])
    printed = capsys.readouterr().out
    assert "not used:\n  attention_chunk_size\n  unsloth_version\n" in printed


def test_a_companion_that_leads_out_of_the_source(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "source")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source" / "tokenizer_config.json").symlink_to(tmp_path / "secret")
    main([str(tmp_path / "source"), "--out", str(tmp_path / "ours")])
    assert "tokenizer_config.json is not copied: it is a link" in capsys.readouterr().out
    assert not (tmp_path / "ours" / "tokenizer_config.json").exists()
    assert (tmp_path / "ours" / "tokenizer.json").exists()
