"""lora.py: adapters and their gradients against plain autograd through merged weights, on packed
experts and on the same experts unpacked."""

from contextlib import nullcontext

import pytest
import torch
from torch.func import functional_call

import fast
import frozen
import lora
from common import assert_all_close, batch, noise_, relative, tiny_config
from frozen import FrozenExperts, pack
from loop import memory
from lora import adapt
from lora_models import (
    CONFIG,
    EVERYTHING,
    model_without_adapters,
    noisy_adapters,
    packed_model,
    random_packed,
    step,
    unpacked_twin,
)
from model import GPTOSS, GPTOSSConfig
from mxfp4 import dequantize_mxfp4

TARGETS = ("qkv", "out", "router", "gate_up", "down")

# --------------------------------------------------------------------------------------------------
# Gradients


def merged_gradients(model, tokens):
    """The same as `step`, by autograd in fp64 through the plain model with W + scale A B."""
    plain = GPTOSS(model.config).double()
    state = {name: p.detach().double() for name, p in lora.base(model).items()}
    factors = {
        name: p.detach().double().requires_grad_() for name, p in lora.adapters(model).items()
    }
    state |= {name: p for name, p in factors.items() if not lora.is_adapter(name)}
    for name in [name.removesuffix("lora_a") for name in factors if name.endswith("lora_a")]:
        a, b = factors[f"{name}lora_a"], factors[f"{name}lora_b"]
        state[f"{name}weight"] = state[f"{name}weight"] + 2 * (b @ a if a.dim() == 2 else a @ b)
    with fast.plain():
        loss = functional_call(plain, state, tokens)
    loss.backward()
    return {"loss": loss.detach()} | {name: factor.grad for name, factor in factors.items()}


@pytest.mark.parametrize("recompute", ["none", "attention", "all"])
@pytest.mark.parametrize("targets", [*TARGETS, "embedding", "unembedding,out", EVERYTHING])
def test_gradients_are_those_through_merged_weights(targets, recompute):
    model = adapt(noise_(GPTOSS(CONFIG, recompute)), 3, 6.0, targets)
    tokens = batch(CONFIG, 2, 29)
    model = noisy_adapters(model)
    assert_all_close(step(model, tokens), merged_gradients(model, tokens), 1e-5)


def test_the_definition_of_adapters():
    """Without any fast twin, in fp64."""
    model, tokens = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, "all").double(), batch(CONFIG, 2, 29)
    noisy_adapters(model)
    with fast.plain():
        actual = step(model, tokens)
    assert_all_close(actual, merged_gradients(model, tokens), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_new_adapters_change_no_bit(packed, dtype):
    tokens, _ = batch(CONFIG, 2, 29)
    model = packed_model(dtype=dtype) if packed else noise_(GPTOSS(CONFIG)).to(dtype)
    for block in model.blocks:  # so that the same kernels run before and after
        block.mlp.__class__ = FrozenExperts
    before = model(tokens)
    adapt(model, 5, 10.0, "attention,router")
    assert torch.equal(model(tokens), before)
    adapt(model, 5, 10.0, "all")
    if dtype == torch.float32:
        assert torch.equal(model(tokens), before)
    noisy_adapters(model)
    assert relative(model(tokens), before) > 1e-2


def test_packed_experts_are_bitwise_the_unpacked_ones():
    """In bf16: logits and the gradients of attention's adapters. The plain model's matrices lie in
    memory as unpacked ones do, because kernels may round another order otherwise."""
    tokens = batch(CONFIG, 2, 29)
    model = adapt(packed_model(dtype=torch.bfloat16), 8, 16.0, "attention")
    twin = adapt(unpacked_twin(model_without_adapters(model)), 8, 16.0, "attention")
    for block in twin.blocks:
        for name in frozen.MATRICES:
            weight = getattr(block.mlp, f"{name}_weight")
            weight.data = weight.data.mT.contiguous().mT
    for m in model, twin:
        noisy_adapters(m)
    assert type(twin.blocks[0].mlp) is not FrozenExperts
    actual, expected = step(model, tokens), step(twin, tokens)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(model(tokens[0]), twin(tokens[0]))


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_packed_experts_in_fp32_are_the_definitions(targets):
    tokens = batch(CONFIG, 2, 29)
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, targets))
    twin = adapt(unpacked_twin(model_without_adapters(model)), 3, 6.0, targets)
    noisy_adapters(twin)
    assert_all_close(step(model, tokens), merged_gradients(twin, tokens), 1e-5)


def test_few_tokens_unpack_few_experts(monkeypatch):
    """As in generation: the same logits from the experts that the tokens chose."""
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, "all"))
    token, sizes = torch.tensor([[5]]), []
    expected = model(token).detach()
    bordered = frozen.bordered
    monkeypatch.setattr(
        frozen, "bordered", lambda w, *a, **k: sizes.append(len(w)) or bordered(w, *a, **k)
    )
    with torch.no_grad():
        assert relative(model(token), expected) < 1e-6
    assert set(sizes) == {CONFIG.experts_per_token}


def test_an_embedding_on_the_host_is_the_same():
    model = noisy_adapters(adapt(noise_(GPTOSS(CONFIG)), 3, 6.0))
    expected = step(model)
    lora.embed_on_host(model)
    assert isinstance(model.embedding, lora.HostEmbedding)
    assert_all_close(step(model), expected, 0)
    trained = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, "embedding")
    lora.embed_on_host(trained)
    assert not isinstance(trained.embedding, lora.HostEmbedding)


# --------------------------------------------------------------------------------------------------
# Attaching


@pytest.mark.parametrize("changes, message", [
    ({"rank": 0}, "lora_rank=0: qkv is a matrix 64 x 96, so its adapters can have ranks 1 to 64"),
    ({"rank": 33, "targets": "experts"}, "lora_rank=33: down is a matrix 32 x 64"),
    ({"rank": 6, "targets": "router"}, "router is a matrix 64 x 5"),
    ({"targets": "attention,mlp"}, "lora_targets='attention,mlp': 'mlp' is none of qkv, out"),
    ({"targets": ""}, "lora_targets='': '' is none of"),
    ({"layers": "0-3"}, "lora_layers='0-3': the model has layers 0 to 2"),
    ({"layers": "99999999999999"}, "the model has layers 0 to 2"),
    ({"layers": "2-1"}, "the model has layers 0 to 2"),
    ({"layers": "first"}, "write numbers and ranges, as in 0-3,12"),
])  # fmt: skip
def test_what_does_not_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(GPTOSS(CONFIG), **changes)


def test_mxfp4_needs_groups():
    with torch.device("meta"), pytest.raises(ValueError, match="matrix has 20: .*--frozen=bf16"):
        pack(GPTOSS(tiny_config()))


def test_only_the_layers_named_are_adapted():
    model = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, "attention,experts", layers="1-2")
    names = {name.split(".lora_")[0].split("_lora_")[0] for name in lora.adapters(model)}
    assert names == {f"blocks.{n}.{m}" for n in (1, 2) for m in
                     ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")}  # fmt: skip
    assert len(step(noisy_adapters(model))) == 1 + 16


def test_new_adapters_do_not_depend_on_what_else_is_there():
    first = adapt(GPTOSS(CONFIG), 3, 6.0, seed=1)
    again = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, seed=1)
    other = adapt(GPTOSS(CONFIG), 3, 6.0, seed=2)
    names = [name for name in lora.adapters(first) if name.endswith("lora_a")]
    assert all(torch.equal(first.get_parameter(n), again.get_parameter(n)) for n in names)
    assert not any(torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in names)
    a = first.get_parameter(names[0])
    assert abs(a.std() * a.shape[1] ** 0.5 - 1) < 0.2


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 2**30])
def test_offload_on_a_gpu(ahead, monkeypatch):
    """Block inputs and the embedding in host memory: the same gradients, bitwise."""
    monkeypatch.setattr(memory, "AHEAD", ahead)
    model = adapt(noise_(GPTOSS(CONFIG, "all").cuda()).bfloat16(), 8, 16.0, "attention")
    tokens, expected = [x.cuda() for x in batch(CONFIG, 2, 64)], None
    noisy_adapters(model)
    for place in nullcontext, memory.HostMemory:
        with place():
            loss = model(*tokens)
        loss.backward()
        found = {name: p.grad.clone() for name, p in lora.adapters(model).items()}
        assert expected is None or all(torch.equal(found[n], expected[n]) for n in found)
        expected = found
        model.zero_grad()
        lora.embed_on_host(model)
        assert not model.embedding.weight.is_cuda


@pytest.mark.gpu
@fast.plain("cudnn_sink_attention")  # whose backward differs from run to run
def test_packed_and_unpacked_at_the_20bs_sizes():
    """Logits and gradients of attention's adapters bitwise, where the unpacked experts lie in
    memory as packed ones are unpacked; new adapters on everything change no bit."""
    config = GPTOSSConfig(num_hidden_layers=2, vocab_size=8192)
    with torch.device("meta"):
        model, plain = pack(GPTOSS(config).bfloat16()), GPTOSS(config).bfloat16()
    model, plain = model.to_empty(device="cuda"), plain.to_empty(device="cuda")
    noise_(plain)
    model.load_state_dict(plain.state_dict(), strict=False)
    for number, (block, twin) in enumerate(zip(model.blocks, plain.blocks)):
        for name, (E, n, m) in ("gate_up", (32, 2880, 5760)), ("down", (32, 2880, 2880)):
            packed = random_packed(E, m, n, number)
            for part, values in zip(("blocks", "scales"), packed):
                getattr(block.mlp, f"{name}_weight_{part}").data.copy_(values)
            whole = dequantize_mxfp4(*(x.cuda() for x in packed)).mT
            getattr(twin.mlp, f"{name}_weight").data = whole
    tokens = [x.cuda() for x in batch(config, 1, 4096)]
    with torch.no_grad():
        before = model(tokens[0])
        assert torch.equal(before, plain(tokens[0]))
    for m in model, plain:
        adapt(m, 16, 32.0, "attention")
    with torch.no_grad():
        assert torch.equal(model(tokens[0]), before)
    for m in model, plain:
        noisy_adapters(m)
    actual, expected = step(model, tokens), step(plain, tokens)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    adapt(model, 16, 32.0, "all")  # all start anew, with B zero
    with torch.no_grad():
        assert torch.equal(model(tokens[0]), before)
