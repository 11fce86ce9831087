"""loop/memory.py: the split master to the last bit, and its Adam against PyTorch's, plain and
sharded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from common import relative, run_ranks
from loop.budget import BYTES
from loop.memory import SplitAdamW, join, split

BITS = st.integers(0, 0x7F7F7FFF) | st.integers(
    -(2**31), -(2**31) + 0x7F7F7FFF
)  # of floats that do not round to infinity


# --------------------------------------------------------------------------------------------------
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


# --------------------------------------------------------------------------------------------------
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
    # a weight's own fp32 resolution is 1e-5 of its step
    assert relative(master_of(optimizer, p) - start, q - start) < 1e-4
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
    """A thousand steps, each far below bf16's resolution of the weight: 1.0, whose next smaller
    neighbour is 0.004 away."""
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
    """Decay alone, no gradient: the weight shrinks by lr x decay of itself, whatever Adam
    thinks."""
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
    "shape, vectors", [((3, 32), (6, 16)), ((1, 16), (1, 16)), ((5, 3), (15, 1)), ((0, 7), (0, 16))]
)
def test_vectors_share_the_tensors_memory(shape, vectors):
    t = torch.zeros(shape)
    assert SplitAdamW.vectors(t).shape == vectors
    SplitAdamW.vectors(t).add_(1)
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
