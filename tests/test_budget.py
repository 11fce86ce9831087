"""loop/budget.py: FLOPs against PyTorch's count and by hand, and the bytes of the dry run."""

import pytest
import torch
from common import batch, noise_, tiny_config
from torch.utils.flop_counter import FlopCounterMode

import fast
from bench.common import TINY
from loop import budget
from loop.budget import BYTES, estimate, forward_flops, recomputed_flops
from model import GPTOSS

# --------------------------------------------------------------------------------------------------
# FLOPs


def test_forward_flops_by_hand():
    assert forward_flops(TINY, 32) == {  # 2 layers, 32 tokens
        "qkv": 2 * 32 * 2 * 64 * 128,
        "out": 2 * 32 * 2 * 64 * 64,
        "router": 2 * 32 * 2 * 64 * 4,
        "gate_up": 2 * 64 * 2 * 64 * 128,  # 2 experts per token
        "down": 2 * 64 * 2 * 64 * 64,
        "unembedding": 32 * 2 * 64 * 512,  # once, not in each layer
        "causal": 4 * 4 * 16 * (32 * 33 // 2),  # 4 heads of 16; query i sees i keys
        # a window of 16: each query of the second half sees 16 keys
        "window": 4 * 4 * 16 * (16 * 17 // 2 + 16 * 16),
    }


def count_all_pairs(monkeypatch):
    """The dense definition computes the scores that the mask then hides."""
    monkeypatch.setattr(budget, "visible_pairs", lambda seq_len, window: seq_len**2)


def test_flops_are_those_that_pytorch_counts(monkeypatch):
    """By definition: what the fast twins add (bias gradients as matmuls) is theirs, not the
    model's."""
    count_all_pairs(monkeypatch)
    config, S = tiny_config(), 32
    model, (tokens, targets) = noise_(GPTOSS(config)), batch(config, 1, S)
    with fast.plain(), FlopCounterMode(display=False) as counter:
        loss = model(tokens, targets)
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == sum(forward_flops(config, S).values())
    assert counter.get_total_flops() == S * budget.flops_per_token(config, S)


def test_recomputed_flops_are_those_that_pytorch_counts(monkeypatch):
    config, S = (
        tiny_config(hidden_size=24, intermediate_size=16),
        32,
    )  # grouped matmuls in bf16 want sizes that 8 divides
    count_all_pairs(monkeypatch)
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


# --------------------------------------------------------------------------------------------------
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
KEPT = "gradients, kept activations"  # usually the larger of the two


def needs(parameters=1_000_000, **changes):
    return estimate(tiny_config(num_hidden_layers=4), parameters=parameters, **{**RUN, **changes})


@pytest.mark.parametrize("ranks, replicas", [(1, 1), (8, 1), (8, 2)])
@pytest.mark.parametrize("optimizer", BYTES)
def test_ranks_share_the_parameters(optimizer, ranks, replicas):
    """And where gradients are copied from fp32 sums to bf16, their memory serves no activations,
    which come on top."""
    run = {"optimizer": optimizer, "ranks": ranks, "replicas": replicas, "sp": 1}
    found, activations = needs(**run), needs(parameters=0, **run)[KEPT]
    weight, gradient, moments = (size * 1_000_000 * replicas // ranks for size in BYTES[optimizer])
    copied = ranks > 2 and optimizer != "fp32"
    assert gradient > activations > 0
    expected = [weight, gradient + activations if copied else gradient, moments]
    assert [found["weights"], found[KEPT], found["optimizer"]] == expected


def test_what_is_kept_for_the_backward():
    """Where it is more than the gradients: B S / sp tokens of C bf16 numbers a layer, with offload
    of two layers; with attention kept also its output and fp32 lse, on full layers."""
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
    """FSDP holds the sums of all blocks, this rank's share of them in fp32, until the replicas' are
    added; but not those that are the gradients themselves."""
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
