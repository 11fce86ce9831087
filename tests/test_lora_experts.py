"""frozen.py: frozen experts, packed and with adapters, against their definition; what is not
computed and not kept; GPUs without grouped matmuls."""

import weakref

import pytest
import torch
import torch.nn.functional as F

import fast
import frozen
from common import assert_all_close, batch, expert_inputs, noise_, relative
from lora import adapt
from lora_models import CONFIG, noisy_adapters, packed_model, random_packed
from model import GPTOSS
from mxfp4 import dequantize_mxfp4

# --------------------------------------------------------------------------------------------------
# The pair


def frozen_case(N=33, k=3, used=range(7), ranks=(8, 16), packed=False):
    """Inputs of frozen_experts, with ranks of the two adapters; 0: none."""
    chosen, gates, x, w1, b1, w2, b2, _ = expert_inputs(N, k, list(used), torch.float32)
    inputs = [x, chosen, gates]
    if packed:  # other sizes than expert_inputs'
        E, C, two_f = 7, 64, 64
        x = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
        b1, b2 = torch.randn(E, two_f) / 3, torch.randn(E, C) / 3
        inputs = [x, chosen, gates]
        matrices = random_packed(E, two_f, C, 1), random_packed(E, C, two_f // 2, 2)
    else:
        matrices = (w1, None), (w2, None)
    for number, (matrix, bias, rank) in enumerate(zip(matrices, (b1, b2), ranks)):
        E, n, m = len(bias), (x.shape[1], b1.shape[1] // 2)[number], bias.shape[1]
        generator = torch.Generator().manual_seed(number)
        a = torch.randn(E, n, rank, generator=generator) / n**0.5 if rank else None
        b = torch.randn(E, rank, m, generator=generator) / 2 if rank else None
        inputs += [*matrix, a, b, bias]
    return [*inputs, 0.9]


CASES = {
    "both": frozen_case(),
    "gate_up, four experts unused": frozen_case(13, 2, [1, 4, 5], (8, 0)),
    "down, all on one expert": frozen_case(17, 1, [3], (0, 8)),
    "packed": frozen_case(ranks=(0, 0), packed=True),
    "packed, both": frozen_case(29, packed=True),
    "one token": frozen_case(1, 7, packed=True),
}
TRAINED = {"x": 0, "gates": 2, "a1": 5, "b1": 6, "a2": 10, "b2": 11}  # places of inputs


def outcome(function, inputs, dtype, recomputed=False):
    leaves = [
        x.to(dtype, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    if dtype == torch.bfloat16:
        leaves[TRAINED["gates"]] = inputs[TRAINED["gates"]].clone()  # fp32 in any model
    trained = {name: leaves[place] for name, place in TRAINED.items() if leaves[place] is not None}
    for leaf in trained.values():
        leaf.requires_grad_()
    if recomputed:
        out = fast.recomputed(function, *leaves, keep_attention=False)
    else:
        out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(grad.to(out.device, dtype))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in trained.items()}


@pytest.mark.parametrize("tile", [1 << 15, 9], ids=["whole", "tiled"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_experts_compute_what_their_definition_says(case, recomputed, tile, monkeypatch):
    monkeypatch.setattr(fast, "EXPERT_TOKENS", tile)
    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = outcome(definition, CASES[case], torch.float64)
    assert_all_close(outcome(twin, CASES[case], torch.float32, recomputed), truth, 1e-5)


def test_a_second_derivative_is_the_definitions():
    def second(function, dtype):
        leaves = [x.to(dtype, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x
                  for x in CASES["packed, both"]]  # fmt: skip
        wanted = [leaves[place].requires_grad_() for place in TRAINED.values()]
        out = function(*leaves)
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out), create_graph=True)
        return dict(enumerate(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)))

    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = second(definition, torch.float64)
    assert_all_close(second(twin, torch.float32), truth, 1e-4)


def test_no_product_of_frozen_experts_is_larger_than_the_rank(monkeypatch):
    """Of matmuls whose result is a matrix per expert, one size is the rank."""
    shapes, grouped_mm = [], F.grouped_mm

    def watched(*args, **kwargs):
        out = grouped_mm(*args, **kwargs)
        if out.dim() == 3:
            shapes.append(min(out.shape[1:]))
        return out

    monkeypatch.setattr(F, "grouped_mm", watched)
    outcome(fast.PAIRS["frozen_experts"][1], CASES["both"], torch.float32)
    assert sorted(shapes) == [8, 8, 16, 16]
    shapes.clear()
    outcome(fast.PAIRS["frozen_experts"][1], CASES["packed"], torch.float32)
    assert shapes == []


def test_autograd_keeps_packed_experts_packed():
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, "experts"))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        loss = model(*batch(CONFIG, 2, 29))
    loss.backward()
    E, whole = CONFIG.num_experts, CONFIG.hidden_size * CONFIG.intermediate_size
    whole = [x.shape for x in saved if x.is_floating_point() and x.dim() == 3
             and len(x) == E and x[0].numel() >= whole]  # fmt: skip
    assert not whole
    assert [x for x in saved if x.dtype == torch.uint8]


@pytest.mark.parametrize("tiles, most", [(1, 1), (3, 2)])
def test_whole_matrices_in_memory(tiles, most, monkeypatch):
    """With one tile one at a time; with several both, and none is unpacked twice in a pass."""
    alive, unpacked = set(), []
    bordered = frozen.bordered

    def watched(*args, **kwargs):
        whole = bordered(*args, **kwargs)
        key = len(unpacked)
        unpacked.append(key)
        alive.add(key)
        weakref.finalize(whole, alive.discard, key)
        counts.append(len(alive))
        return whole

    counts = []
    monkeypatch.setattr(frozen, "bordered", watched)
    monkeypatch.setattr(fast, "EXPERT_TOKENS", -(-33 // tiles))
    outcome(fast.PAIRS["frozen_experts"][1], frozen_case(packed=True), torch.float32)
    assert max(counts) == most and len(unpacked) == 4 and not alive


# --------------------------------------------------------------------------------------------------
# GPUs without grouped matmuls


@pytest.mark.parametrize("version", [(8, 9), (9, 0), (10, 3), (12, 0), None])
def test_a_matmul_per_expert_is_said_once(version, monkeypatch, capsys):
    """On a CPU that passes for a GPU. Trained experts and frozen ones; PyTorch itself falls back,
    by the code that a CPU runs too, so the gradients are tested above and in test_fast.py."""
    fast.say.cache_clear()
    monkeypatch.setattr(fast, "capability", lambda device: version)
    outcome(fast.PAIRS["frozen_experts"][1], CASES["both"], torch.float32)
    noise_(GPTOSS(CONFIG))(*batch(CONFIG, 2, 29)).backward()
    said = capsys.readouterr().out.count("experts: a matmul for each, slower")
    assert said == (version in [(8, 9), (12, 0)])


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tile", [1 << 15, 9], ids=["whole", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_experts_on_a_gpu(case, tile, dtype, monkeypatch):
    """Compiled. In fp32 exact to 1e-5; in bf16 the error is at most twice the definition's, because
    the product with A, or B^T, is rounded too. Nothing is clamped: a value at the limit may be
    rounded to either side."""
    monkeypatch.setattr(fast, "EXPERT_TOKENS", tile)
    inputs = [x.cuda() if torch.is_tensor(x) else x for x in CASES[case][:-1]] + [100.0]
    inputs = [x.to(dtype).float() if torch.is_tensor(x) and x.is_floating_point() else x
              for x in inputs]  # fmt: skip
    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = outcome(definition, inputs, torch.float64)
        plain = outcome(definition, inputs, dtype)
    actual = outcome(twin, inputs, dtype)
    for what in truth:
        ours, theirs = relative(actual[what], truth[what]), relative(plain[what], truth[what])
        assert ours <= max(2 * theirs, 1e-5), f"{what}: {ours:.1e}, the definition {theirs:.1e}"


@pytest.mark.gpu
def test_unpacking_on_a_gpu_is_bitwise_that_on_a_cpu():
    blocks, scales = random_packed(4, 5760, 2880, 0)
    scales.flatten()[:256] = torch.arange(256)
    expected = dequantize_mxfp4(blocks, scales).mT
    whole = frozen.bordered(blocks.cuda(), scales.cuda(), None, None, torch.empty(0, device="cuda",
                            dtype=torch.bfloat16))  # fmt: skip
    same = (whole.cpu() == expected) | (whole.cpu().isnan() & expected.isnan())
    assert whole.shape == expected.shape and same.all()
