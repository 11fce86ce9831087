"""What the tests of conversion share: small models in each of the layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import GPTOSS, GPTOSSConfig

transformers = pytest.importorskip(
    "transformers", reason="transformers is the oracle of these tests: pip install transformers"
)
ROOT = Path(__file__).resolve().parent.parent


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


def edit_tensors(folder, change):
    """Rewrite a folder as one file after `change(tensors)`."""
    tensors = all_tensors(folder)
    change(tensors)
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
