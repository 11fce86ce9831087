"""convert_hf.py against transformers: import, export, and what must leave no folder behind."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from common import noise_
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import convert_hf
import shards
from convert_hf import export_checkpoint, import_checkpoint, main, verify
from model import GPTOSS, GPTOSSConfig
from mxfp4 import dequantize_by_bits, dequantize_mxfp4, quantize_mxfp4

transformers = pytest.importorskip(
    "transformers", reason="transformers is the oracle of these tests: pip install transformers"
)
ROOT = Path(__file__).resolve().parent.parent
GRID = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # by code
# OpenAI's names of Hugging Face's tensors, by hand: the converter's table must not test itself
ORIGINAL = {
    "model.embed_tokens.weight": "embedding.weight",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "unembedding.weight",
    "input_layernorm.weight": "attn.norm.scale",
    "self_attn.sinks": "attn.sinks",
    "self_attn.o_proj.weight": "attn.out.weight",
    "self_attn.o_proj.bias": "attn.out.bias",
    "post_attention_layernorm.weight": "mlp.norm.scale",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.bias": "mlp.gate.bias",
    "mlp.experts.gate_up_proj_bias": "mlp.mlp1_bias",
    "mlp.experts.down_proj_bias": "mlp.mlp2_bias",
    "mlp.experts.gate_up_proj_blocks": "mlp.mlp1_weight.blocks",
    "mlp.experts.gate_up_proj_scales": "mlp.mlp1_weight.scales",
    "mlp.experts.down_proj_blocks": "mlp.mlp2_weight.blocks",
    "mlp.experts.down_proj_scales": "mlp.mlp2_weight.scales",
}
# Sizes (hidden, intermediate): different, so that no transpose fits, and equal, so that a missing
# one loads in silence.
SIZES = pytest.mark.parametrize("sizes", [(32, 64), (64, 64)], ids=["oblong", "square"])


def all_tensors(folder):
    return {
        name: t
        for path in sorted(Path(folder).glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))
    )


def hugging_face_model(sizes=(32, 64), dtype=torch.float32, seed=0):
    """With noise in every parameter: a bug must not hide behind a bias of zero."""
    config = transformers.GptOssConfig(
        num_hidden_layers=3, num_local_experts=4, num_experts_per_tok=2, vocab_size=97,
        hidden_size=sizes[0], intermediate_size=sizes[1], head_dim=16, num_attention_heads=6,
        num_key_value_heads=2, sliding_window=5, max_position_embeddings=4096 * 32,
        rms_norm_eps=3e-5,
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.to(dtype).eval()


def hugging_face_folder(folder, sizes=(32, 64), dtype=torch.bfloat16, seed=0):
    hugging_face_model(sizes, dtype, seed).save_pretrained(folder, max_shard_size="40KB")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def mxfp4_folder(folder, sizes=(32, 64), seed=0):
    """Like the released ones: random blocks and scales in the place of the experts' matrices."""
    hugging_face_folder(folder, sizes, seed=seed)
    tensors, generator = all_tensors(folder), torch.Generator().manual_seed(seed)
    for path in folder.glob("model*"):
        path.unlink()
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        groups = (experts, outputs, inputs // 32)
        tensors[name + "_blocks"] = torch.randint(
            0, 256, (*groups, 16), dtype=torch.uint8, generator=generator
        )
        tensors[name + "_scales"] = torch.randint(
            120, 126, groups, dtype=torch.uint8, generator=generator
        )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def original_folder(source, folder):
    """OpenAI's layout of what a Hugging Face folder holds."""
    tensors, original = all_tensors(source), {}
    for name, tensor in tensors.items():
        prefix, short = "", name
        if name.startswith("model.layers."):
            number, short = name.removeprefix("model.layers.").split(".", 1)
            prefix = f"block.{number}."
        if short.startswith("self_attn.q_proj."):
            kind = short.rsplit(".", 1)[1]
            qkv = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            original[f"{prefix}attn.qkv.{kind}"] = torch.cat(qkv)
        elif short in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"):
            original[prefix + ("mlp.mlp1_weight" if "gate" in short else "mlp.mlp2_weight")] = (
                tensor.mT.contiguous()
            )
        elif not short.startswith(("self_attn.k_proj", "self_attn.v_proj")):
            original[prefix + ORIGINAL[short]] = tensor
    folder.mkdir()
    save_file(original, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    names = [
        "num_hidden_layers",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "head_dim",
        "num_attention_heads",
    ]
    names += ["num_key_value_heads", "sliding_window"]
    fields = {name: config[name] for name in names} | {
        "num_experts": 4,
        "experts_per_token": 2,
        "initial_context_length": 4096,
    }
    fields |= {
        "rope_theta": 150000,
        "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": 32,
        "swiglu_limit": 7.0,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


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
# MXFP4


def test_dequantization_is_transformers_bit_by_bit():
    """Every byte of values under every scale, subnormal and infinite products among them; the last
    scale byte is NaN. By look-up, by bits, and by bits compiled."""
    mxfp4 = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="this transformers has no MXFP4"
    )
    blocks = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    )
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales)  # (1, in, out)
    compiled = torch.compile(dequantize_by_bits, fullgraph=True)
    for unpack in (dequantize_mxfp4, dequantize_by_bits, compiled):
        ours = unpack(blocks, scales).mT
        assert same_bits(ours[:, :, :255].contiguous(), theirs[:, :, :255].contiguous())
        assert ours[:, :, 255].isnan().all()
        # low nibble first: values 2 and 3 of a group are the nibbles of byte 1
        assert ours[0, 2, 130] == 0.5 * 2.0**3


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.binary(min_size=4, max_size=4))
@example(bytes([1] * 64), bytes(4))  # the smallest values there are: no scale puts them into [4, 8)
def test_what_came_out_of_mxfp4_goes_back_unchanged(blocks, scales):
    blocks = torch.tensor(list(blocks), dtype=torch.uint8).view(4, 1, 16)
    scales = (
        torch.tensor(list(scales), dtype=torch.uint8).clamp(max=252).view(4, 1)
    )  # 6 * 2 ** 126 and more is beyond bf16
    values = dequantize_mxfp4(blocks, scales)
    assert same_bits(dequantize_mxfp4(*quantize_mxfp4(values)), values)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=32, max_size=32)
    | st.lists(st.floats(-8, 8), min_size=32, max_size=32),
    st.integers(-20, 20),
)
@example([7.5, 3.5, 7.9] + [0.25] * 29, 0)  # the larger scale is better
@example([7.5] + [0.5] * 31, 0)  # the smaller one is, in spite of the value above 7
@example([7.5 * 2.0**125] * 32, 0)  # the larger one would make infinity in bf16
def test_quantization_takes_the_better_scale_and_the_nearest_value(values, shift):
    """Against all codes under both scales, in fp64: ties go to the even code and smaller scale."""
    weight = (torch.tensor(values, dtype=torch.float64) * 2.0**shift).float()
    weight = weight.nan_to_num(posinf=3e38, neginf=-3e38)
    blocks, scales = quantize_mxfp4(weight)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten().long()
    largest = weight.abs().max().item()
    floor = max(0, math.frexp(largest)[1] - 1 - 2 + 127) if largest else 0
    best = None
    for scale in (floor, floor + 1):
        scaled = (weight.double() / 2.0 ** (scale - 127)).abs()
        distance = (GRID[:8].double() - scaled[:, None]).abs()  # (32, 8)
        even_first = (
            distance * 4 + torch.tensor([0, 1] * 4) * distance.amin(-1, True).clamp(1e-9) * 1e-9
        )
        nearest = even_first.argmin(-1)
        error = (distance.amin(-1) * 2.0 ** (scale - floor)).square().sum().item()
        reaches = nearest.max() < 6 or scale < 253  # 4 * 2 ** 126 is beyond bf16
        if best is None or (reaches and error < best[0] * (1 - 1e-6)):
            best = error, scale, nearest
    error, scale, nearest = best
    rounded = dequantize_mxfp4(blocks, scales).double()
    assert rounded.isfinite().all()
    found = ((rounded - weight.double()) / 2.0 ** (floor - 127)).square().sum().item()
    assert found == pytest.approx(error, rel=1e-5, abs=1e-12)
    if scales.item() == scale:
        assert torch.equal(codes % 8, nearest)
    assert torch.equal(codes >= 8, weight.signbit())


def test_the_better_scale_has_less_error_on_normal_weights():
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).view(-1, 32)
    blocks, scales = quantize_mxfp4(weight)
    error = (dequantize_mxfp4(blocks, scales).view_as(weight) - weight).norm() / weight.norm()
    floor = torch.frexp(weight.abs().amax(-1)).exponent - 3  # the format's own choice
    scaled = weight.abs() / torch.exp2(floor.float())[:, None]
    rounded = GRID[(GRID[:8] - scaled[..., None]).abs().argmin(-1)]
    before = ((rounded - scaled) * torch.exp2(floor.float())[:, None]).norm() / weight.norm()
    print(f"relative error {error:.4f}, with the smaller scale always {before:.4f}")
    assert error < 0.985 * before
    larger = (scales[:, 0].int() - 127 - floor).bool()
    assert 0.02 < larger.float().mean() < 0.5, "both scales are chosen"


def test_ties_at_every_threshold():
    """Values halfway between two of the grid, under a 6 that fixes the scale to 1."""
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.cat([torch.tensor([6.0]), halfway, -halfway, torch.zeros(17)])
    rounded = dequantize_mxfp4(*quantize_mxfp4(weight)).cpu()
    assert rounded[1:8].tolist() == [0, 1, 1, 2, 2, 4, 4] and rounded[8:15].tolist() == [
        0,
        -1,
        -1,
        -2,
        -2,
        -4,
        -4,
    ]


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


def training_run(folder, hidden_size=64):
    """A run's folder with a trained model in fp32, and no file of Hugging Face's."""
    config = GPTOSSConfig(
        num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=97,
        hidden_size=hidden_size, intermediate_size=64, head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=7, initial_context_length=256, rms_norm_eps=1e-4,
        max_position_embeddings=1024, rope_theta=2000.0, rope_scaling_factor=4.0,
        rope_ntk_alpha=2.0, rope_ntk_beta=8.0,
    )  # fmt: skip
    model = GPTOSS(config)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    model.save_checkpoint(folder / "model")
    return folder


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
# What must fail, in one error that names it, and leave nothing behind


def edit_tensors(folder, change):
    """Rewrite a folder as one file after `change(tensors)`."""
    tensors = all_tensors(folder)
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")


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


def many_tensors(folder):
    extra = {f"model.layers.0.self_attn.absmax.{i}": torch.zeros(1) for i in range(20_000)}
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
    (many_tensors, ["20000 problems", "and 19990 more"]),
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


def test_mxfp4_refuses_what_it_cannot_hold(tmp_path):
    run = training_run(tmp_path / "run", hidden_size=48)
    with pytest.raises(ValueError, match="multiple of 32 inputs, and this has 48"):
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
    "arguments", [[], ["a", "--export", "b", "--out", "c"], ["--export", "b"], ["a", "--mxfp4"]]
)
def test_options_that_do_not_go_together(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


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
    monkeypatch.setattr(convert_hf, "free_memory", lambda: 0)
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


def test_free_memory(monkeypatch):
    assert 2**28 < convert_hf.free_memory() < 2**50
    if convert_hf.DEVICE == "cpu" and Path("/proc/meminfo").exists():
        monkeypatch.setattr(
            Path, "read_text", lambda path: "MemFree: 1 kB\nMemAvailable:    4096 kB\n"
        )
        assert convert_hf.free_memory() == 2**22
        monkeypatch.setattr(
            Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError(path))
        )
        assert 2**28 < convert_hf.free_memory() < 2**50, "as on macOS"


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


def test_command_line(tmp_path, whole):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        command = [sys.executable, str(ROOT / "convert_hf.py"), *map(str, arguments)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    done = run(whole)
    assert done.returncode == 0, done.stderr
    assert "GB/s" in done.stdout and (tmp_path / "checkpoints" / "source" / "config.json").exists()
    offline = run("openai/no-such-model-of-theirs")
    assert offline.returncode == 1 and offline.stderr.startswith(
        "error: openai/no-such-model-of-theirs: no such folder here"
    )
