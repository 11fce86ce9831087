"""What reinforcement learning asks of model.py: temperature, entropy, weights per token, routes;
against logits by hand in fp64, and on 2 and 4 sequence-parallel ranks against one."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode

import fast
import lora
import sp
from common import (
    assert_all_close,
    batch,
    gradients,
    noise_,
    packed,
    relative,
    run_ranks,
    tiny_config,
)
from model import GPTOSS, IGNORED

B, S = 3, 24


def make(recompute="none", **changes):
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2, **changes)
    return noise_(GPTOSS(config, recompute))


def documents():
    """Packed rollouts: of several prompts in a sequence, numbered in no order."""
    return torch.stack(
        [packed(n, d) for n, d in (([9, 15], [4, 1]), ([24], [0]), ([1, 23], [2, 3]))]
    )


def weights():
    return torch.randn(B, S, generator=torch.Generator().manual_seed(11))


def by_hand(model, tokens, targets, documents, temperature, routes=None):
    """logprobs and entropies (B, S) from the logits of the plain model in fp64, and that model."""
    exact = copy.deepcopy(model).double()
    exact.recompute = "none"
    with fast.plain():
        logp = (exact(tokens, documents=documents, routes=routes) / temperature).log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return picked * (targets != IGNORED), -(logp.exp() * logp).sum(-1), exact


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize("packing", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy(temperature, packing, recompute):
    model = make(recompute)
    tokens, targets = batch(model.config, B, S)
    docs = documents() if packing else None
    found = model.logprobs(tokens, targets, docs, temperature=temperature, entropy=True)
    *expected, exact = by_hand(model, tokens, targets, docs, temperature)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32 and (ours - theirs).abs().max() <= 1e-5
    (found[0] * weights() + 0.3 * found[1]).sum().backward()
    (expected[0] * weights() + 0.3 * expected[1]).sum().backward()
    assert_all_close(gradients(model), gradients(exact), 1e-5)
    with torch.no_grad():  # without entropy, and without a graph: the same numbers
        alone = model.logprobs(tokens, targets, docs, temperature=temperature)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("used", [0, 1], ids=["logprobs", "entropy"])
def test_one_of_the_pair_alone_has_a_gradient(used):
    model = make()
    tokens, targets = batch(model.config, B, S)
    model.logprobs(tokens, targets, entropy=True)[used].sum().backward()
    *expected, exact = by_hand(model, tokens, targets, None, 1.0)
    expected[used].sum().backward()
    assert_all_close(gradients(model), gradients(exact), 1e-5)


def test_weights_per_token():
    model, w = make(), weights()
    tokens, targets = batch(model.config, B, S)
    loss = model(tokens, targets, weights=w)
    picked, _, exact = by_hand(model, tokens, targets, None, 1.0)
    expected = -(w * picked).sum() / (targets != IGNORED).sum()
    loss.backward()
    expected.backward()
    assert relative(loss, expected) <= 1e-5
    assert_all_close(gradients(model), gradients(exact), 1e-5)
    with torch.no_grad():
        assert relative(model(tokens, targets, weights=w), expected) <= 1e-5
        ones = torch.ones_like(w)
        assert relative(model(tokens, targets, weights=ones), model(tokens, targets)) <= 1e-6


def test_weights_cost_no_matmul():
    """The loss takes three through the vocabulary with and without them; logprobs takes four, and
    with the entropy no more."""
    model, w = make(), weights()
    config, (tokens, targets) = model.config, batch(model.config, B, S)

    def flops(call):
        with FlopCounterMode(display=False) as counter:
            call().backward()
        return counter.get_total_flops()

    loss = flops(lambda: model(tokens, targets))
    assert flops(lambda: model(tokens, targets, weights=w)) == loss
    one = 2 * B * S * config.vocab_size * config.hidden_size
    assert flops(lambda: model.logprobs(tokens, targets).sum()) == loss + one
    pair = flops(lambda: sum(model.logprobs(tokens, targets, entropy=True)).sum())
    assert pair == loss + one


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_routes(recompute):
    """Given back, the router's own routes change nothing, bitwise; other routes are obeyed, and the
    gates' gradients still flow."""
    model = make(recompute)
    config, (tokens, targets) = model.config, batch(model.config, B, S)
    routes = model.routes(tokens)
    assert routes.shape == (config.num_hidden_layers, B, S, config.experts_per_token)
    model(tokens, targets).backward()
    own = gradients(model)
    model.zero_grad()
    replayed = model(tokens, targets, routes=routes.to(torch.uint8))  # any integers
    replayed.backward()
    assert all(torch.equal(own[name], grad) for name, grad in gradients(model).items())
    kept = make()  # nothing recomputed, the same bits
    kept(tokens, targets, routes=kept.routes(tokens)).backward()
    assert all(torch.equal(own[name], grad) for name, grad in gradients(kept).items())
    assert torch.equal(
        model.logprobs(tokens, targets, routes=routes), model.logprobs(tokens, targets)
    )

    other = (routes + 1) % config.num_experts
    model.zero_grad()
    model.logprobs(tokens, targets, routes=other).sum().backward()
    picked, _, exact = by_hand(model, tokens, targets, None, 1.0, other)
    picked.sum().backward()
    assert_all_close(gradients(model), gradients(exact), 1e-5)
    assert relative(picked, model.logprobs(tokens, targets)) > 1e-2
    assert gradients(model)["blocks.0.mlp.router.weight"].norm() > 1e-3


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_routes_with_adapters(recompute):
    """Of every kind, the router's too: they choose other experts than the base, and those are the
    routes, to the bit. Other routes are obeyed, and reach the adapters' gradients."""
    base = make(recompute)
    tokens, targets = batch(base.config, B, S)
    model = lora.adapt(copy.deepcopy(base), rank=2, alpha=2, targets="all")
    for number, adapter in enumerate(lora.adapters(model).values()):
        nn.init.normal_(adapter, 0, 0.3, generator=torch.Generator().manual_seed(number))
    routes = model.routes(tokens)
    assert (routes != base.routes(tokens)).any()
    found = {}
    for name, given in ("own", None), ("replayed", routes), ("base's", base.routes(tokens)):
        model.zero_grad()
        logp = model.logprobs(tokens, targets, routes=given)
        (logp * weights()).sum().backward()
        found[name] = {"logp": logp.detach(), **gradients_of(lora.adapters(model))}
    own, replayed, other = found.values()
    assert all(torch.equal(own[name], x) for name, x in replayed.items())
    assert all(relative(other[name], x) > 1e-3 for name, x in own.items())
    picked, _, exact = by_hand(model, tokens, targets, None, 1.0, base.routes(tokens))
    (picked * weights()).sum().backward()
    assert_all_close(other, {"logp": picked, **gradients_of(lora.adapters(exact))}, 1e-5)


def gradients_of(parameters):
    return {name: p.grad for name, p in parameters.items()}


def test_the_ratio_is_one_on_policy():
    """Reference logprobs under no_grad, then those with a graph: the same kernels and routes give
    the same bits, so exp(logp - reference) is 1. They disturb neither gradients nor routes."""
    model = make("all")
    tokens, targets = batch(model.config, B, S)
    model(tokens, targets).backward()
    before, routes = gradients(model), model.routes(tokens)
    with torch.no_grad():
        reference = model.logprobs(tokens, targets, routes=routes)
    model.zero_grad()
    loss = model(tokens, targets)
    with torch.no_grad():  # between a forward and its backward
        model.logprobs(tokens, targets)
    loss.backward()
    assert all(torch.equal(before[name], grad) for name, grad in gradients(model).items())
    logp = model.logprobs(tokens, targets, routes=routes)
    assert (torch.exp(logp - reference) == 1).all()


def test_left_padding_by_documents():
    """Padding on the left with a document number of its own changes no logprob: positions are
    relative, so they need no restart."""
    model, length = make(), 17
    tokens, targets = batch(model.config, 1, length)
    pad = S - length
    padded = torch.cat((torch.zeros(1, pad, dtype=torch.int64), tokens), dim=1)
    wanted = torch.cat((torch.full((1, pad), IGNORED), targets), dim=1)
    docs = (torch.arange(S) >= pad).long()[None]
    found = model.logprobs(padded, wanted, docs)[:, pad:]
    assert (found - model.logprobs(tokens, targets)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": 0}, "temperature=0 must be positive"),
        ({"routes": torch.zeros(3, B, S, 3).long()}, r"routes must be integers of .*3, 24, 2\)"),
        ({"routes": torch.full((3, B, S, 2), 5)}, "routes must lie in.*num_experts=5"),
    ],
)  # fmt: skip
def test_wrong_arguments(options, message):
    model = make()
    tokens, targets = batch(model.config, B, S)
    with pytest.raises(ValueError, match=message):
        model.logprobs(tokens, targets, **options)
    with pytest.raises(ValueError, match=r"weights must be of shape \(3, 24\); got \(3,\)"):
        model(tokens, targets, weights=torch.ones(3))


# --------------------------------------------------------------------------------------------------
# Sequence-parallel ranks


def outcome(cut):
    """{what: result or gradient} of this rank's slices; `cut` makes slices of a batch."""
    found = {}
    for recompute in ("none", "all"):
        model = make(recompute)
        tokens, targets = batch(model.config, B, S)
        tokens, targets, docs, w = cut(tokens, targets, documents(), weights())
        routes = model.routes(tokens, docs)
        pair = model.logprobs(tokens, targets, docs, temperature=0.7, entropy=True, routes=routes)
        loss = model(tokens, targets, docs, weights=w, routes=routes)
        (loss + (pair[0] * w).sum() + pair[1].sum() / 10).backward()
        found[recompute] = {
            "slices": {"logp": pair[0].detach(), "entropy": pair[1].detach(), "routes": routes},
            "sums": {"loss": loss.detach(), **gradients(model)},
        }
    return found


def on_ranks():
    sp.init(init_device_mesh("cpu", (dist.get_world_size(),)))
    return outcome(sp.shard)


@functools.cache
def alone():
    return outcome(lambda *tensors: tensors)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_equal_one(ranks):
    found = run_ranks(ranks, on_ranks)
    for recompute, expected in alone().items():
        parts = [each[recompute] for each in found]
        for what, whole in expected["slices"].items():
            dim = 2 if what == "routes" else 1
            joined = torch.cat([part["slices"][what] for part in parts], dim)
            assert relative(joined, whole) <= 1e-6, what
        sums = {n: sum(part["sums"][n] for part in parts) for n in expected["sums"]}
        assert_all_close(sums, expected["sums"], 1e-5)
