"""memory.py: the split master to the last bit, its Adam against PyTorch's, plain and sharded, and the arithmetic before a run."""

import pytest
import torch
from common import batch, noise_, relative, run_ranks, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

from loop import budget
from loop.budget import BYTES, estimate, recomputed_flops
from loop.memory import SplitAdamW, join, split
from model import GPTOSS

BITS = st.integers(0, 0x7F7F7FFF) | st.integers(
    -(2**31), -(2**31) + 0x7F7F7FFF
)  # of floats that do not round to infinity


# ----------------------------------------------------------------------------------------------------------------------
# Master weights


def master(*bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


@given(st.lists(BITS, min_size=1))
def test_split_and_join(bits):
    """Every bit comes back, and the upper half is the nearest bf16."""
    weights = master(*bits)
    high, rest = split(weights)
    assert (high.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(high, rest).view(torch.int32), weights.view(torch.int32))
    nearest = weights.bfloat16()  # rounds a tie to even, split away from zero
    tie = weights.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~tie].view(torch.int16), nearest[~tie].view(torch.int16))
    assert torch.equal(
        (high[tie].float() - weights[tie]).abs(), (nearest[tie].float() - weights[tie]).abs()
    )


def test_split_at_the_edges():
    edges = master(
        0, -(2**31), 1, 0x7FFF, 0x8000, 0x8001, 0x3F7FFFFF, 0x3F808000, 0x3F818000, 0x7F7F7FFF
    )
    edges = torch.cat((edges, -edges))
    assert torch.equal(join(*split(edges)).view(torch.int32), edges.view(torch.int32))


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gradient(shape, step):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)).bfloat16()


def random_weight(shape=(6, 5)):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(99)) / 50).bfloat16()


def master_of(optimizer, p):
    return join(p.detach(), optimizer.state[p]["rest"])


def split_steps(p, steps, **settings):
    optimizer = SplitAdamW([p], **{**SETTINGS, **settings})
    for step in range(steps):
        p.grad = gradient(p.shape, step)
        optimizer.step()
    return optimizer


def test_first_step_is_pytorchs():
    """Before any moment has been rounded."""
    p, q = torch.nn.Parameter(random_weight()), torch.nn.Parameter(random_weight().float())
    optimizer, theirs = split_steps(p, 1), torch.optim.AdamW([q], **SETTINGS)
    q.grad = gradient(q.shape, 0).float()
    theirs.step()
    start = random_weight().float()
    assert (
        relative(master_of(optimizer, p) - start, q - start) < 1e-4
    )  # a weight's own fp32 resolution is 1e-5 of its step
    assert torch.equal(p, split(master_of(optimizer, p))[0])


def test_many_steps_stay_beside_pytorchs():
    """Nothing but the moments' bf16 stands between them."""
    p, q = torch.nn.Parameter(random_weight()), torch.nn.Parameter(random_weight().float())
    optimizer, theirs = split_steps(p, 100), torch.optim.AdamW([q], **SETTINGS)
    for step in range(100):
        q.grad = gradient(q.shape, step).float()
        theirs.step()
    start = random_weight().float()
    assert relative(master_of(optimizer, p) - start, q - start) < 0.02


def test_no_update_is_lost():
    """A thousand steps, each far below bf16's resolution of the weight: 1.0, whose next smaller neighbour is 0.004 away."""
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = SplitAdamW([p], lr=1e-6)
    for _ in range(1000):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.allclose(
        1 - master_of(optimizer, p), torch.full((4,), 1e-3), rtol=0.06
    )  # each step is rounded to 1.2e-7 / 2
    assert torch.equal(p, torch.full_like(p, 1 - 2**-10).bfloat16())


def test_decay_and_learning_rate():
    """Decay alone, no gradient: the weight shrinks by lr x decay of itself, whatever Adam thinks."""
    p = torch.nn.Parameter(random_weight())
    optimizer = SplitAdamW([p], lr=0.5, weight_decay=0.25)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(master_of(optimizer, p), random_weight().float() * (1 - 0.125), rtol=1e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    before = master_of(optimizer, p)
    p.grad = gradient(p.shape, 1)
    optimizer.step()
    assert torch.equal(master_of(optimizer, p), before)


def test_parameter_without_gradient_is_left_alone():
    p = torch.nn.Parameter(random_weight())
    optimizer = SplitAdamW([p], **SETTINGS)
    optimizer.step()
    assert torch.equal(p, random_weight()) and optimizer.state[p]["step"] == 0


@pytest.mark.parametrize(
    "shape, rows", [((3, 32), (6, 16)), ((1, 16), (1, 16)), ((5, 3), (15, 1)), ((0, 7), (0, 16))]
)
def test_rows_are_the_tensor(shape, rows):
    t = torch.zeros(shape)
    assert SplitAdamW.rows(t).shape == rows
    SplitAdamW.rows(t).add_(1)
    assert t.sum() == t.numel()


def sharded_steps(steps):
    mesh = init_device_mesh("cpu", (2,))
    p = torch.nn.Parameter(distribute_tensor(random_weight(), mesh, [Shard(0)]))
    optimizer = SplitAdamW([p], **SETTINGS)
    for step in range(steps):
        p.grad = distribute_tensor(gradient((6, 5), step), mesh, [Shard(0)])
        optimizer.step()
    local = join(p.detach().to_local(), optimizer.state[p]["rest"].to_local())
    return DTensor.from_local(local, mesh, [Shard(0)]).full_tensor()


def test_sharded_and_plain_are_equal():
    p = torch.nn.Parameter(random_weight())
    expected = master_of(split_steps(p, 5), p)
    assert all(torch.equal(found, expected) for found in run_ranks(2, sharded_steps, 5))


def test_beta2_beyond_bf16():
    with pytest.raises(ValueError, match="beta2=0.999"):
        SplitAdamW([torch.nn.Parameter(random_weight())], lr=1e-3, betas=(0.9, 0.999))


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
def test_bytes_a_parameter(optimizer):
    """What the table says is what the tensors take."""
    kind = torch.float32 if optimizer == "fp32" else torch.bfloat16
    p = torch.nn.Parameter(torch.zeros(1000, dtype=kind))
    p.grad = torch.zeros_like(p)
    made = torch.optim.AdamW([p]) if optimizer == "fp32" else SplitAdamW([p], lr=1e-3)
    made.step()
    state = sum(x.nbytes for x in made.state[p].values() if x.dim())
    assert (p.nbytes / 1000, p.grad.nbytes / 1000, state / 1000) == BYTES[optimizer]


# ----------------------------------------------------------------------------------------------------------------------
# Estimate

RUN = {
    "ranks": 8,
    "sp": 4,
    "replicas": 1,
    "seq_len": 64,
    "micro_batch": 2,
    "optimizer": "fp32",
    "recompute": "all",
    "offload": False,
}
KEPT = "gradients, kept activations"  # usually the larger of the two, for they are not there at the same time


def needs(parameters=1_000_000, **changes):
    return estimate(tiny_config(num_hidden_layers=4), parameters=parameters, **{**RUN, **changes})


@pytest.mark.parametrize("ranks, replicas", [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("optimizer", BYTES)
def test_ranks_share_the_parameters(optimizer, ranks, replicas):
    """And where gradients are copied from fp32 sums to bf16, their memory serves no activations, which come on top."""
    run = {"optimizer": optimizer, "ranks": ranks, "replicas": replicas, "sp": 1}
    found, activations = needs(**run), needs(parameters=0, **run)[KEPT]
    weight, gradient, moments = (size * 1_000_000 * replicas // ranks for size in BYTES[optimizer])
    copied = ranks > 2 and optimizer != "fp32"
    assert gradient > activations > 0
    expected = [weight, gradient + activations if copied else gradient, moments]
    assert [found["weights"], found[KEPT], found["optimizer"]] == expected


def test_what_is_kept_for_the_backward():
    """Where it is more than the gradients: B S / sp tokens of C bf16 numbers a layer, with offload of two layers; with attention
    kept also its output and fp32 lse, on full layers."""
    config, tokens = tiny_config(), 2 * 2**20 // 4

    def kept(**changes):
        return needs(seq_len=2**20, **changes)[KEPT]

    layer = 2 * tokens * config.hidden_size
    assert kept() == 4 * layer and kept(offload=True) == 2 * layer and kept(sp=8) == 2 * layer
    assert kept(recompute="attention") == 4 * layer + 2 * tokens * (2 * 6 * 8 + 4 * 6)
    block = (
        2 * tokens * (4 * 20 + (6 + 2 * 4) * 8 + 2 * 6 * 8 + 2 * 2 * 12)
    )  # at sp 4 three key-value heads would be four
    assert (
        kept(recompute="none") == 4 * block
        and kept(keep_blocks=9) == kept(keep_blocks=4) == 4 * block
    )
    assert kept(keep_blocks=1) == 3 * layer + block
    assert kept(keep_blocks=2, recompute="attention") == 2 * layer + 2 * block + tokens * (
        2 * 6 * 8 + 4 * 6
    )
    alone = 2 * 4 * tokens * (4 * 20 + (6 + 2 * 3) * 8 + 6 * 8 * 3 // 2 + 2 * 2 * 12)
    assert kept(keep_blocks=4, sp=1) == 4 * alone


def gathered(ranks, kind, **changes):
    return needs(ranks=ranks, sp=1, optimizer=kind, **changes)["gathered by FSDP"]


def test_two_ranks_add_gradients_in_bf16():
    """2 bytes a number instead of 4, unless the gradients are kept in fp32."""
    of = {(ranks, kind): gathered(ranks, kind) for ranks in (1, 2, 4) for kind in BYTES}
    assert (
        of[1, "split"]
        == of[2, "split"]
        == of[2, "bf16"]
        < of[2, "fp32"]
        == of[4, "split"]
        == of[4, "fp32"]
    )


def test_replicas_wait_for_each_other():
    """FSDP holds the sums of all blocks, this rank's share of them in fp32, until the replicas' are added; but not those that
    are the gradients themselves."""
    held = 4 * 1_000_000 * 2 // 8
    for kind, micro_batches, more in (
        ("fp32", 1, 0),
        ("fp32", 2, held),
        ("split", 1, held),
        ("split", 2, held),
    ):
        assert (
            gathered(8, kind, replicas=2, micro_batches=micro_batches)
            - gathered(8, kind, micro_batches=micro_batches)
            == more
        )


def test_longer_sequences_need_more_of_what_they_fill():
    short, long = needs(seq_len=2**20), needs(seq_len=2**21)
    assert {what for what in short if long[what] > short[what]} == {KEPT, "working set"}
    assert all(size > 0 for size in short.values())


def test_recomputed_flops_are_those_that_pytorch_counts(monkeypatch):
    config, S = (
        tiny_config(hidden_size=24, intermediate_size=16),
        32,
    )  # grouped matmuls in bf16 want sizes that 8 divides
    monkeypatch.setattr(budget, "keys", lambda config, layer, S: S)  # the dense path computes all
    tokens, targets = batch(config, 1, S)

    def product(a, b, *_, out_shape=None, **__):
        return 2 * a[0] * a[1] * b[-1]

    def counted(*recompute):
        model, aten = noise_(GPTOSS(config, *recompute)).bfloat16(), torch.ops.aten
        mapping = {
            aten._grouped_mm: product,
            aten.addmm_: lambda total, a, b, **settings: product(a, b),
        }
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            model(tokens, targets).backward()
        return counter.get_total_flops()

    plain = counted("none")
    assert recomputed_flops(config, S, "none", 0) == recomputed_flops(config, S, "all", 3) == 0
    for blocks in 0, 1:
        assert counted("all", blocks) - plain == S * recomputed_flops(config, S, "all", blocks) > 0
    full = 4 * 6 * 8 * S  # scores and values of the one layer that sees everything: 6 heads of 8
    assert (
        recomputed_flops(config, S, "all", 0) - recomputed_flops(config, S, "attention", 0) == full
    )
