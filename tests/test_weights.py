"""weights.py and shards.py: what a folder holds, and what must not load."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import folders
import shards
import weights
from common import noise_, tiny_config
from model import GPTOSS, GPTOSSConfig
from test_config import ANYTHING, INDEX_FILE, ORIGINAL, write
from weights import find_model

# --------------------------------------------------------------------------------------------------
# Checkpoint folders


def assert_same_weights(a, b):
    theirs = dict(b.named_parameters())
    assert theirs.keys() == dict(a.named_parameters()).keys()
    for name, x in a.named_parameters():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10_000])
def test_checkpoint_round_trip(shard_bytes, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    model = noise_(GPTOSS(tiny_config())).to(dtype)
    folder = tmp_path / "runs" / "checkpoint"
    model.save_checkpoint(folder)
    again = GPTOSS.from_checkpoint(folder)
    assert again.config == model.config
    assert_same_weights(again, model)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {
        file.name: sum(t.nbytes for t in load_file(file).values())
        for file in folder.glob("*.safetensors")
    }
    assert (
        index["metadata"]["total_size"]
        == sum(sizes.values())
        == sum(p.nbytes for p in model.parameters())
    )
    assert set(sizes) == {
        f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)
    }
    assert set(index["weight_map"].values()) == set(sizes)
    assert (
        (len(sizes) > 3 and max(sizes.values()) <= 10_000)
        if shard_bytes == 10_000
        else len(sizes) == 1
    )
    assert os.listdir(folder.parent) == ["checkpoint"]  # nothing half-written is left beside it
    for wanted in (torch.float32, torch.bfloat16):
        assert_same_weights(GPTOSS.from_checkpoint(folder, dtype=wanted), model.to(wanted))


def test_checkpoint_in_another_dtype(tmp_path):
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    assert_same_weights(GPTOSS.from_checkpoint(tmp_path / "half"), model.bfloat16())


def test_checkpoint_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    noise_(GPTOSS(tiny_config(num_hidden_layers=5))).save_checkpoint(tmp_path / "last")
    left = tmp_path / f".last.partial-{folders.machine()}-00000000"  # of a run that was killed
    left.mkdir()
    (left / "rubbish").touch()
    model = noise_(GPTOSS(tiny_config()), seed=1)
    model.save_checkpoint(tmp_path / "last")
    assert_same_weights(GPTOSS.from_checkpoint(tmp_path / "last"), model)
    assert os.listdir(tmp_path) == ["last"]
    files = set(
        json.loads((tmp_path / "last" / "model.safetensors.index.json").read_text())[
            "weight_map"
        ].values()
    )
    assert set(os.listdir(tmp_path / "last")) == files | {
        "config.json",
        "model.safetensors.index.json",
    }


def test_checkpoint_does_not_replace_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    with pytest.raises(ValueError, match="something other than a checkpoint"):
        model.save_checkpoint(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "empty").mkdir()
    model.save_checkpoint(tmp_path / "empty")


def test_load_weights_lists_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = index["weight_map"]

    def rewrite(name, change):  # the file that holds `name`
        path = tmp_path / files[name]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    rewrite("norm.weight", lambda t: t.update({"norm.weight": torch.ones(19)}))
    rewrite(
        "blocks.1.attention.sinks", lambda t: t.pop("blocks.1.attention.sinks")
    )  # listed, and not in its file
    truncated = files["blocks.2.mlp.gate_up_weight"]
    (tmp_path / truncated).write_bytes((tmp_path / truncated).read_bytes()[:-100])
    lost = files["blocks.0.mlp.gate_up_weight"]
    (tmp_path / lost).unlink()
    bias = files["blocks.9.extra"] = files.pop("blocks.1.mlp.router.bias")
    assert len({truncated, lost, files["norm.weight"], files["blocks.1.attention.sinks"]}) == 4
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError) as error:
        GPTOSS.from_checkpoint(tmp_path, dtype=torch.float32)
    for problem in (
        "missing: blocks.1.mlp.router.bias",
        "unknown: blocks.9.extra",
        r"norm.weight has shape \(19,\).*\(20,\)",
        f"blocks.1.attention.sinks is in the index, not in {files['blocks.1.attention.sinks']}",
        f"blocks.1.mlp.router.bias is in {bias}, not in the index",
        f"{truncated} is unreadable",
        f"{lost} is unreadable",
    ):
        error.match(problem)


@pytest.mark.parametrize("damage", ["unlisted", "truncated", "lost"])
def test_load_weights_says_so_when_the_norm_is_what_does_not_fit(damage, tmp_path):
    """from_checkpoint looks at this tensor first, for the dtype."""
    noise_(GPTOSS(tiny_config())).save_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = tmp_path / index["weight_map"]["norm.weight"]
    if damage == "unlisted":
        del index["weight_map"]["norm.weight"]
        write(path, index)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    message = "norm.weight is in .*, not in the index" if damage == "unlisted" else file.name
    with pytest.raises(ValueError, match=message):
        GPTOSS.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"norm.weight": "../elsewhere.safetensors"}},
        {"weight_map": {"norm.weight": "/etc/passwd"}},
        {"weight_map": {"norm.weight": 3}},
        {"weight_map": ["norm.weight"]},
        {},
        [],
    ],
)
def test_wrong_index(index, tmp_path):
    tiny_config().to_json(tmp_path / "config.json")
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="index.json: not a readable index"):
        GPTOSS.from_checkpoint(tmp_path)


def test_checkpoint_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="config.json: not a readable"):
        GPTOSS.from_checkpoint(tmp_path / "absent")


def test_long_lists_show_ten_and_a_count(tmp_path):
    """And a configuration of more layers than tensors is refused before a model is built."""
    noise_(GPTOSS(tiny_config(num_hidden_layers=20))).save_checkpoint(tmp_path)
    with torch.device("meta"):
        small = GPTOSS(tiny_config(num_hidden_layers=2)).to_empty(device="cpu")
    with pytest.raises(ValueError, match="does not fit the model, 234 problems:") as error:
        weights.load_weights(small, tmp_path)
    assert str(error.value).endswith("\n  and 224 more") and str(error.value).count("\n") == 11
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", config | {"num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match="1000000000 layers, and there are 263 tensors"):
        GPTOSS.from_checkpoint(tmp_path)


def test_every_tensor_is_aligned(tmp_path):
    """An fp32 tensor after an odd number of bf16 values: there torch could not view it."""
    places = shards.create_shards(
        tmp_path, {"odd": (torch.bfloat16, (3,)), "wide": (torch.float32, (2, 5))}
    )
    odd, wide = torch.randn(3).bfloat16(), torch.randn(2, 5)
    places["odd"].write(0, odd)
    places["wide"].write(1, wide[1:])
    places["wide"].write(0, wide[:1])
    loaded = load_file(next(tmp_path.glob("*.safetensors")))
    assert torch.equal(loaded["odd"], odd) and torch.equal(loaded["wide"], wide)
    assert places["wide"].offset % 4 == 0


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def cut_to_half(path):
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b"\0")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, cut_to_half, lengthen, empty, os.unlink])
def test_a_file_that_changes_after_its_header_was_read(damage, tmp_path, monkeypatch):
    """Its length is compared at every read: what is missing never becomes zeros."""
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    places, _ = shards.read_places(tmp_path)
    again = GPTOSS(tiny_config())
    monkeypatch.setattr(weights, "open_weights", lambda *_: places)
    weights.load_weights(again, tmp_path)
    assert_same_weights(again, model)
    damage(path)
    for place in places.values():
        with pytest.raises(OSError, match=path.name):
            place[:]
    with pytest.raises(OSError, match=path.name):
        weights.load_weights(again, tmp_path)


def test_a_read_error_is_one_error(tmp_path, monkeypatch):
    """A disk that fails in the middle of a tensor. Reads that return less are continued."""
    noise_(GPTOSS(tiny_config())).save_checkpoint(tmp_path)
    places, _ = shards.read_places(tmp_path)
    place, whole = places["embedding.weight"], load_file(next(tmp_path.glob("*.safetensors")))

    class Disk:
        def __init__(self, file, budget):
            self.file, self.budget = file, budget

        def readinto(self, view):
            if self.budget <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            count = self.file.readinto(view[: min(len(view), 1000)])
            self.budget -= count
            return count

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    for budget, fails in ((10**9, False), (2000, True)):
        with monkeypatch.context() as patch:
            disk = lambda *a, b=budget, **k: Disk(open(*a, **k), b)  # noqa: E731, SIM115
            patch.setattr(shards, "open", disk, raising=False)
            if fails:
                with pytest.raises(OSError, match=f"cannot read {place.path}: Input/output error"):
                    place[:]
            else:
                assert torch.equal(place[:], whole["embedding.weight"])
    assert torch.equal(place[3:9], whole["embedding.weight"][3:9])
    assert place[61:70].shape == (0, 20)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=4), ANYTHING, max_size=3) | ANYTHING)
@example({"weight_map": {"a": ""}})
@example({"weight_map": {"a": ".."}})
@example({"weight_map": {"a": "b\0c"}})
@example({"weight_map": {"a": ["b"]}})
def test_any_index_is_files_of_the_folder_or_one_error(tmp_path, index):
    for content in (index, {"weight_map": index}):
        write(tmp_path / INDEX_FILE, content)
        try:
            files = shards.weight_files(tmp_path)
        except ValueError as error:
            assert "not a readable index" in str(error)
            continue
        assert all(path.parent == tmp_path and path.name for path in files.values())
        with pytest.raises(ValueError, match="no tensors"):
            shards.read_places(tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=4), ANYTHING | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "I64", "F8_E4M3", "x"]) | ANYTHING,
     "shape": st.lists(st.integers(-1, 2**63), max_size=3) | ANYTHING,
     "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2) | ANYTHING}
), max_size=3))  # fmt: skip
def test_any_header_is_tensors_or_a_problem(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    try:
        places, problems = shards.read_places(tmp_path)
    except ValueError as error:
        assert "no tensors in safetensors files here" in str(error)
    else:
        assert not problems
        with pytest.raises(ValueError, match="does not fit the model"):
            shards.check_places(tmp_path, places, problems, {"norm.weight": (20,)})


def test_unreadable_is_not_absent(tmp_path, monkeypatch):
    """An index that cannot be examined must not be taken for one that is not there: this folder
    would be read by its files, that one be overwritten."""
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    model.save_checkpoint(tmp_path / "model")
    stat = os.stat

    def failing(path, *arguments, **options):
        if str(path).endswith(INDEX_FILE):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    before = sorted(os.listdir(tmp_path / "model"))
    monkeypatch.setattr(os, "stat", failing)
    for attempt in (
        lambda: shards.read_places(tmp_path / "model"),
        lambda: find_model(tmp_path / "model"),
        lambda: GPTOSSConfig.from_json(tmp_path / "model" / "config.json"),
        lambda: model.save_checkpoint(tmp_path / "model"),
    ):
        with pytest.raises(PermissionError, match="Permission denied"):
            attempt()
    assert sorted(os.listdir(tmp_path / "model")) == before


# --------------------------------------------------------------------------------------------------
# What lies in a folder


def their_folder(folder, name, config):
    folder.mkdir(parents=True)
    save_file({name: torch.zeros(3)}, folder / "model.safetensors")
    write(folder / "config.json", config)
    return folder


def test_find_model(tmp_path):
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    model.save_checkpoint(tmp_path / "checkpoint")
    model.save_checkpoint(tmp_path / "bare" / "model")  # a run whose other files were not copied
    model.save_checkpoint(tmp_path / "run" / "model")
    model.save_checkpoint(tmp_path / "parent" / "model")
    write(tmp_path / "run" / "config.json", {"tokenizer": "bytes", "steps": 3})
    (tmp_path / "run" / "metrics.jsonl").touch()
    theirs = their_folder(tmp_path / "theirs", "model.layers.0.self_attn.sinks", {"model_type": ""})
    original = their_folder(tmp_path / "original", "block.0.attn.sinks", ORIGINAL)
    run, bare, plain = tmp_path / "run", tmp_path / "bare", tmp_path / "checkpoint"
    for folder, expected in [
        (plain, ("ours", plain, None, None)),
        (run, ("ours", run / "model", run, "bytes")),
        (run / "model", ("ours", run / "model", run, "bytes")),
        (bare, ("ours", bare / "model", bare, None)),
        (theirs, ("hugging_face", theirs, None, None)),
        (original, ("openai", original, None, None)),
        (str(theirs), ("hugging_face", theirs, None, None)),
    ]:
        assert find_model(folder) == expected


def test_find_model_says_what_is_wrong(tmp_path):
    noise_(GPTOSS(tiny_config(num_hidden_layers=1))).save_checkpoint(tmp_path / "no index")
    (tmp_path / "no index" / INDEX_FILE).unlink()
    (tmp_path / "unfinished").mkdir()
    write(tmp_path / "unfinished" / "config.json", {"tokenizer": "bytes"})
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "no weights").mkdir()
    write(tmp_path / "no weights" / "config.json", ORIGINAL)
    their_folder(tmp_path / "other", "transformer.wte", {})
    (tmp_path / "file").touch()
    for name, message in {
        "absent": "absent: no such folder. convert_hf.py makes",
        "file": "file: no such folder",
        "unfinished": "this run has no model/ yet. train.py with --resume=true",
        "started": "this run has no model/ yet",
        "empty": "empty/config.json does not exist; convert_hf.py makes",
        "no weights": "no tensors in safetensors files here",
        "no index": f"{INDEX_FILE} does not exist.*convert_hf.py",
        "other": "neither our names nor .* but 'transformer.wte'; convert_hf.py",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path / name)


def test_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    everything = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 2**28 < weights.free_memory(cpu) <= everything

    def meminfo(text):
        monkeypatch.setattr(Path, "read_text", lambda path: text)
        return weights.free_memory(cpu)

    assert meminfo("MemFree: 1 kB\nMemAvailable:    4096 kB\n") == 2**22
    assert meminfo("MemFree: 1 kB\n") == everything // 2
    missing = FileNotFoundError("/proc/meminfo")  # as on macOS
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(missing))
    assert weights.free_memory(cpu) == everything // 2


@pytest.mark.gpu
def test_free_memory_of_a_gpu():
    """What PyTorch keeps for later is free."""
    gpu = torch.device("cuda")
    before = weights.free_memory(gpu)
    held = torch.empty(2**28, dtype=torch.uint8, device=gpu)
    assert before - weights.free_memory(gpu) >= 2**28
    del held
    assert abs(before - weights.free_memory(gpu)) < 2**27


# --------------------------------------------------------------------------------------------------
# Companions


def test_companions_that_are_links(tmp_path, capsys):
    """A link out of the folder could point to anybody's file; the Hub's cache consists of them."""
    secret, source, out = tmp_path / "secret", tmp_path / "source", tmp_path / "out"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (source, out, snapshot, blobs):
        folder.mkdir(parents=True)
    secret.write_text("secret")
    (blobs / "f00d").write_text("from the Hub")
    (source / "tokenizer.json").write_text("mine")
    (source / "tokenizer_link.json").symlink_to(source / "tokenizer.json")
    (source / "tokenizer_config.json").symlink_to(secret)
    (source / "tokenizer.old").mkdir()
    (source / "unrelated.json").touch()
    weights.copy_companions(source, out)
    assert sorted(os.listdir(out)) == ["tokenizer.json", "tokenizer_link.json"]
    assert not (out / "tokenizer_link.json").is_symlink()
    assert (
        f"tokenizer_config.json is not copied: it is a link to {secret}" in capsys.readouterr().out
    )
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/f00d")
    (snapshot / "tokenizer.model").symlink_to(secret)
    weights.copy_companions(snapshot, out)
    assert (out / "chat_template.jinja").read_text() == "from the Hub"
    assert not (out / "tokenizer.model").exists()
