"""convert_hf.py against transformers: import, export, verification and the command line."""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file

import convert_hf
import shards
from common import noise_
from convert_hf import export_checkpoint, import_checkpoint, main, verify
from hf_folders import (
    ROOT,
    SIZES,
    all_tensors,
    edit_tensors,
    hugging_face_folder,
    mxfp4_folder,
    original_folder,
    same_bits,
    training_run,
    transformers,
)
from model import GPTOSS, GPTOSSConfig
from mxfp4 import dequantize_mxfp4


def ids(length=37, batch=2):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


def their_model(folder, dtype="auto"):
    """Without its option transformers keeps MXFP4 packed, or asks for the accelerate package."""
    quantized = "quantization_config" in json.loads((folder / "config.json").read_text())
    options = (
        {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if quantized else {}
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return (
        model if dtype == "auto" else model.to(dtype)
    )  # before 5.2x, MXFP4 became bf16 whatever dtype said


@torch.no_grad()
def our_logits(folder):
    return GPTOSS.from_checkpoint(folder, dtype=torch.float32)(ids())


@torch.no_grad()
def their_logits(folder):
    return their_model(folder, torch.float32)(ids()).logits


def assert_close(a, b):
    assert b.std() > 0.3, "logits that are all alike would agree with anything"
    assert (a - b).abs().max() <= 1e-5


# --------------------------------------------------------------------------------------------------
# Import


@SIZES
@pytest.mark.parametrize("make", [hugging_face_folder, mxfp4_folder])
def test_import_computes_what_transformers_does(tmp_path, sizes, make):
    source = make(tmp_path / "source", sizes)
    import_checkpoint(str(source), tmp_path / "ours")
    assert_close(our_logits(tmp_path / "ours"), their_logits(source))
    assert GPTOSSConfig.from_json(tmp_path / "ours" / "config.json") == GPTOSSConfig.from_json(
        source / "config.json"
    )
    kept = {path.name for path in (tmp_path / "ours").iterdir() if path.suffix != ".safetensors"}
    assert kept == {"config.json", "hf_config.json", "tokenizer.json", "chat_template.jinja",
                    "generation_config.json", "model.safetensors.index.json"}  # fmt: skip


@SIZES
def test_mxfp4_experts_equal_transformers_bit_by_bit(tmp_path, sizes):
    source = mxfp4_folder(tmp_path / "source", sizes)
    import_checkpoint(str(source), tmp_path / "ours")
    ours, theirs = all_tensors(tmp_path / "ours"), their_model(source)
    for number, layer in enumerate(theirs.model.layers):
        gate_up = layer.mlp.experts.gate_up_proj.detach()
        gates, ups = ours[f"blocks.{number}.mlp.gate_up_weight"].chunk(2, dim=-1)
        assert same_bits(gates.contiguous(), gate_up[..., ::2]) and same_bits(
            ups.contiguous(), gate_up[..., 1::2]
        )
        assert same_bits(
            ours[f"blocks.{number}.mlp.down_weight"], layer.mlp.experts.down_proj.detach()
        )


@SIZES
@pytest.mark.parametrize("make", [hugging_face_folder, mxfp4_folder])
def test_openai_layout_imports_to_the_same(tmp_path, sizes, make):
    source = make(tmp_path / "source", sizes)
    original = original_folder(source, tmp_path / "original")
    import_checkpoint(str(source), tmp_path / "a")
    import_checkpoint(str(original), tmp_path / "b")
    a, b = all_tensors(tmp_path / "a"), all_tensors(tmp_path / "b")
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_openai_layout_has_its_tokenizer_beside_it(tmp_path, monkeypatch):
    """On the Hub: weights in NAME/original, the other files in NAME. A file in original/ itself
    comes first; of a folder of another name nothing outside it is read."""
    source = hugging_face_folder(tmp_path / "NAME")
    original = original_folder(source, source / "original")
    (original / "chat_template.jinja").write_text("its own")
    monkeypatch.chdir(original)
    import_checkpoint(".", tmp_path / "ours")
    texts = {path.name: path.read_text() for path in (tmp_path / "ours").glob("[tcg]*.j*")}
    assert texts.pop("generation_config.json") == (source / "generation_config.json").read_text()
    assert texts.pop("config.json") != (source / "config.json").read_text()
    assert texts == {"tokenizer.json": "{}", "chat_template.jinja": "its own"}
    original.rename(source / "mine")
    import_checkpoint(str(source / "mine"), tmp_path / "again")
    files = {path.name for path in (tmp_path / "again").iterdir()}
    assert "chat_template.jinja" in files and not files & {"tokenizer.json", "hf_config.json"}


@SIZES
@pytest.mark.parametrize("original", [False, True], ids=["hugging_face", "openai"])
def test_packed_import_holds_the_same_values(tmp_path, sizes, original):
    """Unpacked when it is loaded, it is bitwise the unpacked import; on disk experts take a byte
    for two values."""
    source = mxfp4_folder(tmp_path / "source", sizes)
    original = original_folder(source, tmp_path / "original") if original else source
    import_checkpoint(str(source), tmp_path / "plain")
    import_checkpoint(str(original), tmp_path / "packed", packed=True)
    plain, packed = all_tensors(tmp_path / "plain"), all_tensors(tmp_path / "packed")
    for name, matrix in plain.items():
        if name.endswith(("gate_up_weight", "down_weight")):
            blocks, scales = (packed.pop(f"{name}_{part}") for part in ("blocks", "scales"))
            assert blocks.dtype == scales.dtype == torch.uint8
            assert same_bits(dequantize_mxfp4(blocks, scales).mT.contiguous(), matrix)
            assert blocks.numel() * 2 == scales.numel() * 32 == matrix.numel()
        else:
            assert same_bits(packed.pop(name), matrix)
    assert packed == {}
    a = GPTOSS.from_checkpoint(tmp_path / "packed")
    b = GPTOSS.from_checkpoint(tmp_path / "plain")
    assert all(same_bits(x.data, y.data) for x, y in zip(a.parameters(), b.parameters()))
    if original is source:  # OpenAI's config.json leaves out an epsilon that is not the default
        assert_close(our_logits(tmp_path / "packed"), their_logits(source))


def test_packed_export(tmp_path, capsys):
    """Back to MXFP4 byte for byte, as stored; to bf16 as from the unpacked folder."""
    source = mxfp4_folder(tmp_path / "source")
    import_checkpoint(str(source), tmp_path / "packed", packed=True)
    export_checkpoint(tmp_path / "packed", tmp_path / "back", mxfp4=True)
    assert "blocks and scales as they were stored" in capsys.readouterr().out
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(same_bits(before[n], after[n]) for n in before)
    assert_close(our_logits(tmp_path / "packed"), their_logits(tmp_path / "back"))
    export_checkpoint(tmp_path / "packed", tmp_path / "bf16", dtype=torch.bfloat16)
    import_checkpoint(str(source), tmp_path / "plain")
    export_checkpoint(tmp_path / "plain", tmp_path / "expected", dtype=torch.bfloat16)
    a, b = all_tensors(tmp_path / "bf16"), all_tensors(tmp_path / "expected")
    assert a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_stored_dtypes_stay_and_shards_are_whole(tmp_path, monkeypatch):
    """Mixed dtypes and odd sizes: every tensor must be aligned, or torch cannot map it."""
    source = hugging_face_folder(tmp_path / "source")
    for path in source.glob("*.safetensors"):
        wide = {
            name: t.float() if name.endswith(("sinks", "router.bias")) else t
            for name, t in load_file(path).items()
        }
        save_file(wide, path)
    monkeypatch.setattr(shards, "SHARD_BYTES", 30_000)
    monkeypatch.setattr(
        convert_hf, "SLICE_BYTES", 1_000
    )  # so that slices of several rows and of one occur
    import_checkpoint(str(source), tmp_path / "ours")
    tensors = all_tensors(tmp_path / "ours")
    assert {t.dtype for name, t in tensors.items() if name.endswith(("sinks", "router.bias"))} == {
        torch.float32
    }
    assert {
        t.dtype for name, t in tensors.items() if not name.endswith(("sinks", "router.bias"))
    } == {torch.bfloat16}
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert (
        files
        == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
        and len(files) > 3
    )
    assert index["weight_map"].keys() == tensors.keys() and set(
        index["weight_map"].values()
    ) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for path in (tmp_path / "ours").glob("*.safetensors"):
        largest = max(t.nbytes for t in load_file(path).values())
        assert sum(t.nbytes for t in load_file(path).values()) < 30_000 + largest
    assert_close(our_logits(tmp_path / "ours"), their_logits(source))


def test_download_takes_only_top_level_files(tmp_path, monkeypatch):
    """The Hub's patterns let * match a slash: plausible ones fetch three copies of the weights."""
    listing = ["config.json", "generation_config.json", "model-00000-of-00002.safetensors",
               "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
               "special_tokens_map.json", "chat_template.jinja"]  # fmt: skip
    others = [".gitattributes", "README.md", "LICENSE", "original/config.json",
              "original/model.safetensors", "metal/model.bin", "original/dtypes.json",
              "pytorch_model.bin", "modeling.py"]  # fmt: skip

    def snapshot_download(name, allow_patterns, ignore_patterns):
        assert name == "openai/gpt-oss-20b"
        # as huggingface_hub filters: a star matches a slash
        allowed = [
            file
            for file in listing + others
            if any(fnmatch(file, pattern) for pattern in allow_patterns)
        ]
        assert "original/model.safetensors" in allowed, "the trap that ignore_patterns is for"
        assert [
            file
            for file in allowed
            if not any(fnmatch(file, pattern) for pattern in ignore_patterns)
        ] == listing
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert convert_hf.fetch("openai/gpt-oss-20b") == tmp_path


MEMORY = """
import sys, convert_hf, torch
def peak():  # of this program; getrusage's would begin with that of the parent
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
convert_hf.dequantize_mxfp4(*(torch.zeros(s, dtype=torch.uint8) for s in ((32, 16), (32,))))
before = peak()
convert_hf.main(sys.argv[1:])
print(peak() - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(),
    reason="reads /proc, and counts what the CPU needs",
)
@pytest.mark.slow
def test_peak_memory_is_under_three_of_the_largest_tensor(tmp_path):
    """On 96 MiB of experts, in MXFP4 and out again. One slice of them is 3 MiB."""
    experts, hidden, intermediate = 32, 512, 1536
    config = GPTOSSConfig(num_hidden_layers=1, num_experts=experts, vocab_size=64, head_dim=64,
                          hidden_size=hidden, intermediate_size=intermediate,
                          num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    with torch.device("meta"):
        model = GPTOSS(config)
    model = model.bfloat16().to_empty(device="cpu")
    model.init_weights()
    model.save_checkpoint(tmp_path / "run")
    largest = experts * hidden * 2 * intermediate * 2

    def peak(arguments):
        command = [sys.executable, "-c", MEMORY, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    run, packed, ours = (str(tmp_path / name) for name in ("run", "packed", "ours"))
    out, back = peak(["--export", run, "--out", packed, "--mxfp4"]), peak([packed, "--out", ours])
    print(
        f"peak over the start: export {out / largest:.2f}, import {back / largest:.2f} of the "
        "largest tensor"
    )
    assert max(out, back) < 3 * largest


# --------------------------------------------------------------------------------------------------
# Export


@SIZES
def test_import_then_export_is_bitwise_and_loads(tmp_path, sizes):
    source = hugging_face_folder(tmp_path / "source", sizes)
    import_checkpoint(str(source), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(
        same_bits(before[name], after[name]) for name in before
    )
    for name in "tokenizer.json", "chat_template.jinja", "generation_config.json":
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    assert_close(our_logits(tmp_path / "ours"), their_logits(tmp_path / "back"))
    assert their_model(tmp_path / "back").dtype == torch.bfloat16


@SIZES
def test_mxfp4_in_and_out_holds_the_same_values(tmp_path, sizes, capsys):
    source = mxfp4_folder(tmp_path / "source", sizes)
    import_checkpoint(str(source), tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back", mxfp4=True)
    assert "relative error 0.000e+00" in capsys.readouterr().out
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name in before:
        if name.endswith("_blocks"):
            scales = name.replace("_blocks", "_scales")
            assert same_bits(
                dequantize_mxfp4(before[name], before[scales]),
                dequantize_mxfp4(after[name], after[scales]),
            )
        elif not name.endswith("_scales"):
            assert same_bits(before[name], after[name])
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert_close(our_logits(tmp_path / "ours"), their_logits(tmp_path / "back"))


def test_export_of_a_training_run(tmp_path, capsys):
    """No field has its default (but swiglu_limit, which older transformers fix at 7): each must be
    written as others read it."""
    run = training_run(tmp_path / "run")
    export_checkpoint(run, tmp_path / "plain")
    assert_close(our_logits(run / "model"), their_logits(tmp_path / "plain"))
    assert GPTOSSConfig.from_json(tmp_path / "plain" / "config.json") == GPTOSSConfig.from_json(
        run / "model" / "config.json"
    )
    assert {t.dtype for t in all_tensors(tmp_path / "plain").values()} == {torch.float32}

    export_checkpoint(run, tmp_path / "mxfp4", mxfp4=True)
    printed = capsys.readouterr().out
    assert (
        "note: rms_norm_eps is 0.0001; vLLM" in printed
        and "max_position" not in printed
        and "swiglu" not in printed
    )
    stated = float(printed.split("relative error ")[1].split()[0])
    import_checkpoint(str(tmp_path / "mxfp4"), tmp_path / "quantized")
    before, after = all_tensors(run / "model"), all_tensors(tmp_path / "quantized")
    names = [name for name in before if name.endswith(("gate_up_weight", "down_weight"))]
    error = sum((before[name] - after[name].float()).double().square().sum() for name in names)
    measured = math.sqrt(error / sum(before[name].double().square().sum() for name in names))
    assert stated == pytest.approx(measured, rel=1e-3) and 0.05 < stated < 0.2
    assert_close(our_logits(tmp_path / "quantized"), their_logits(tmp_path / "mxfp4"))


def test_export_to_bf16_with_a_tokenizer_from_elsewhere(tmp_path):
    run, elsewhere = training_run(tmp_path / "run"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tokenizer.json").write_text("{}")
    main(
        [
            "--export",
            str(run),
            "--out",
            str(tmp_path / "out"),
            "--dtype",
            "bfloat16",
            "--tokenizer",
            str(elsewhere),
        ]
    )
    stored = all_tensors(run / "model")["norm.weight"]
    assert same_bits(all_tensors(tmp_path / "out")["model.norm.weight"], stored.bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(SystemExit, match="elsewhere2: no such folder"):
        main(
            [
                "--export",
                str(run),
                "--out",
                str(tmp_path / "out2"),
                "--tokenizer",
                str(tmp_path / "elsewhere2"),
            ]
        )


# --------------------------------------------------------------------------------------------------
# --verify, and the command line


@pytest.mark.parametrize("make", [hugging_face_folder, mxfp4_folder])
def test_verify_passes_a_good_conversion_and_fails_a_bad_one(tmp_path, make, capsys):
    source, out = make(tmp_path / "source", (64, 64)), tmp_path / "ours"
    (source / "tokenizer.json").unlink()  # an empty one, which transformers cannot read
    main([str(source), "--out", str(out), "--verify"])
    printed = capsys.readouterr().out
    assert "with gates and ups exchanged" in printed
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["blocks.0.mlp.down_weight"] = tensors[
        "blocks.0.mlp.down_weight"
    ].mT.contiguous()  # square: loads in silence
    save_file(tensors, path)
    with pytest.raises(SystemExit, match="does not compute what"):
        main([str(source), "--out", str(out), "--verify"])


def test_verify_in_bf16_judges_the_median_token(tmp_path, capsys, monkeypatch):
    """Where memory is short for fp32. With weights this large some tokens go to other experts in
    bf16."""
    source, out = hugging_face_folder(tmp_path / "source", (64, 64)), tmp_path / "ours"
    (source / "tokenizer.json").unlink()
    edit_tensors(
        source,
        lambda tensors: [t.mul_(0.2) for name, t in tensors.items() if "experts" not in name],
    )
    monkeypatch.setattr(convert_hf, "free_memory", lambda device: 0)
    main([str(source), "--out", str(out), "--verify"])
    found = re.search(
        r"tokens in bfloat16, .*: (\S+), and (\S+) for the median", capsys.readouterr().out
    )
    assert float(found[2]) < 0.5 and float(found[2]) < float(found[1])
    path = next(out.glob("*.safetensors"))
    tensors = load_file(path)
    tensors["blocks.0.mlp.down_weight"] = tensors["blocks.0.mlp.down_weight"].mT.contiguous()
    save_file(tensors, path)
    with pytest.raises(SystemExit, match="verify it in fp32, with 0 GB"):
        main([str(source), "--out", str(out), "--verify"])


@pytest.mark.slow
def test_verify_at_the_20bs_layer_shapes(tmp_path, capsys):
    """One layer of each kind; takes 7 GB of memory and of disk."""
    config = transformers.GptOssConfig(num_hidden_layers=2, num_local_experts=32, vocab_size=1024)
    model = noise_(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    model.save_pretrained(tmp_path / "source")
    del model
    try:
        main([str(tmp_path / "source"), "--out", str(tmp_path / "ours"), "--verify"])
    finally:
        shutil.rmtree(tmp_path)
    printed = capsys.readouterr().out
    print(printed)
    assert float(re.search(r"tokens in float32, .*: (\S+), and", printed)[1]) <= 1e-4


def test_verify_refuses_a_comparison_that_cannot_fail(tmp_path):
    """With all experts zero, exchanged gates and ups change nothing: the control fails."""
    source = hugging_face_folder(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    edit_tensors(
        source, lambda tensors: [t.zero_() for name, t in tensors.items() if "experts" in name]
    )
    import_checkpoint(str(source), tmp_path / "ours")
    with pytest.raises(ValueError, match="does not compute what"):
        verify(str(source), tmp_path / "ours")


def test_command_line(tmp_path, monkeypatch, capsys):
    """The script itself, without a network."""
    source = hugging_face_folder(tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_hf.py", *map(str, arguments)])
        runpy.run_path(ROOT / "convert_hf.py", run_name="__main__")
        return capsys.readouterr().out

    said = run(source)
    assert "GB/s" in said and (tmp_path / "checkpoints" / "source" / "config.json").exists()
    with pytest.raises(SystemExit) as offline:
        run("openai/no-such-model-of-theirs")
    assert offline.value.code.startswith(
        "error: openai/no-such-model-of-theirs: no such folder here"
    )


# --------------------------------------------------------------------------------------------------
# What travels with an export: where generation ends, and the tokenizer


@pytest.mark.parametrize(
    "vocabulary, name, given, expected",
    [
        (201_088, None, None, [200_002, 200_012, 199_999]),
        (201_216, "o200k_harmony", None, [200_002, 200_012, 199_999]),
        (257, "bytes", None, [256]),
        (201_088, None, {"eos_token_id": 200_002, "top_k": 7}, [200_002, 200_012, 199_999]),
        (201_088, None, {"eos_token_id": [199_999, 200_012, 200_002]}, None),
        (97, None, None, None),
    ],
    ids=["released", "padded", "bytes", "one end", "all ends", "unknown"],
)
def test_generation_ends_where_answers_do(tmp_path, vocabulary, name, given, expected):
    """None: what was there stays as it was."""
    path, config = tmp_path / "generation_config.json", GPTOSSConfig(vocab_size=vocabulary)
    if given:
        path.write_text(json.dumps(given))
    before = path.read_bytes() if given else None
    convert_hf.write_generation_config(tmp_path, config, name)
    if expected is None:
        assert (path.read_bytes() if path.exists() else None) == before
        return
    read = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert read.eos_token_id == expected and read.top_k == (given or {}).get("top_k")
    pad, begin = (256, None) if name == "bytes" else (199_999, 199_998)
    assert (read.pad_token_id, read.bos_token_id) == (pad, begin)


def real_tokenizer(folder, words):
    tokenizers = pytest.importorskip("tokenizers", reason="transformers' tokenizers")
    vocabulary = {f"w{i}": i for i in range(words)} | {"?": words}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="?")
    wrapped.save_pretrained(folder)
    return folder


def test_ready_is_said_of_what_is(tmp_path, capsys):
    """A run that began with a converted model: its export has that model's tokenizer, and answers
    to a text in transformers. Other sizes than vLLM's, or another tokenizer: it says so."""
    source = hugging_face_folder(tmp_path / "source")
    (source / "tokenizer.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    real_tokenizer(source, 90)
    import_checkpoint(str(source), tmp_path / "ours")
    capsys.readouterr()
    export_checkpoint(tmp_path / "ours", tmp_path / "out")
    assert capsys.readouterr().out.endswith("out is ready for transformers and vLLM\n")
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("w3 w80").input_ids
    assert ids == [3, 80]
    assert their_model(tmp_path / "out")(torch.tensor([ids])).logits.isfinite().all()

    run = training_run(tmp_path / "run")  # with another rms_norm_eps
    export_checkpoint(run, tmp_path / "a", tokenizer=source)
    assert capsys.readouterr().out.endswith("a is ready for transformers\n")
    larger = real_tokenizer(tmp_path / "larger", 97)
    export_checkpoint(run, tmp_path / "b", tokenizer=larger)
    printed = capsys.readouterr().out
    assert (
        "is ready" not in printed and "a tokenizer of 98 tokens for a vocabulary of 97" in printed
    )
    (larger / "tokenizer.json").write_text("{}")
    export_checkpoint(run, tmp_path / "c", tokenizer=larger)
    printed = capsys.readouterr().out
    assert "is ready" not in printed and "tokenizer.json that cannot be read (KeyError" in printed
