"""Models with adapters for the tests: packed ones, their twins, noise in adapters, folders.

Sizes are multiples of 32, which MXFP4 needs, and no two are equal."""

import torch

import frozen
import lora
from common import batch, noise_, tiny_config
from frozen import pack
from lora import adapt
from model import GPTOSS
from mxfp4 import dequantize_mxfp4
from weights import save_weights

SIZES = {"hidden_size": 64, "intermediate_size": 32}
CONFIG = tiny_config(**SIZES)
EVERYTHING = "all,embedding,unembedding"


def random_packed(E, outputs, inputs, seed):
    """Blocks and scales of values around 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    shape = E, outputs, inputs // 32
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)


def packed_model(config=CONFIG, dtype=torch.float32, recompute="none"):
    """Packed, with noise in every parameter."""
    with torch.device("meta"):
        model = GPTOSS(config, recompute)
    model = pack(model.to(dtype)).to_empty(device="cpu")
    model.load_state_dict(noise_(GPTOSS(config)).state_dict(), strict=False)
    for number, block in enumerate(model.blocks):
        for name in frozen.MATRICES:
            there = [getattr(block.mlp, f"{name}_weight_{part}") for part in ("blocks", "scales")]
            E, outputs, groups = there[1].shape
            for parameter, values in zip(there, random_packed(E, outputs, 32 * groups, number)):
                parameter.data.copy_(values)
    return model


def unpacked_twin(model):
    """The same weights in the plain model, unpacked."""
    state = dict(model.named_parameters())
    for name in [name for name in state if name.endswith("_blocks")]:
        weight = name.removesuffix("_blocks")
        values = dequantize_mxfp4(state.pop(name), state.pop(f"{weight}_scales")).mT
        state[weight] = values.to(model.embedding.weight.dtype)
    twin = GPTOSS(model.config, model.recompute).to(model.embedding.weight.dtype)
    twin.load_state_dict(state)
    return twin


def noisy_adapters(model, seed=7):
    """B not zero, and A and B such that both matter."""
    for number, parameter in enumerate(lora.adapters(model).values()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter.shape[1] ** 0.5 / 2)
    return model


def step(model, tokens=None):
    """{loss and the gradient of every adapter}"""
    model.zero_grad()
    loss = model(*(tokens or batch(CONFIG, 2, 29)))
    loss.backward()
    frozen = [name for name, p in lora.base(model).items() if p.grad is not None]
    assert not frozen, f"gradients of frozen weights: {frozen}"
    return {"loss": loss.detach(), **{n: p.grad for n, p in lora.adapters(model).items()}}


def model_without_adapters(model):
    plain = packed_model(model.config, model.embedding.weight.dtype)
    plain.load_state_dict(lora.original(model))
    return plain


def write_base(folder, packed=False, seed=0):
    """A checkpoint folder, in bf16."""
    model = (
        packed_model(dtype=torch.bfloat16) if packed else noise_(GPTOSS(CONFIG), seed).bfloat16()
    )
    save_weights(model, folder, None, CONFIG.to_json)
    return folder


def write_adapters(folder, base, targets=EVERYTHING, layers=""):
    """Adapters on the checkpoint folder `base`. Returns the model that has them."""
    model = lora.from_checkpoint(base, dtype=torch.float32)
    settings = {"rank": 3, "alpha": 6.0, "targets": targets, "layers": layers}
    model = noisy_adapters(adapt(model, **settings))
    settings |= {"base": str(base), "identity": lora.identity(base)}
    lora.save_adapters(model, folder, settings, CONFIG.to_json)
    return model
