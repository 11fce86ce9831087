"""fast.py: every fast twin against its definition in model.py, outputs and gradients; the switch
between them; and what each twin promises to save.

On a CPU the twins run in fp32 and are compared with their definitions in fp64. On a GPU they run
compiled in bf16, and a twin is right if it is as near to the definition in fp64 as the definition
itself is in bf16.
"""

import copy
import functools
import re
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fast
import flash
import frozen as frozen_module  # noqa: F401, has a pair and leaves too
import generate  # noqa: F401, has compiled leaves too
import model as model_module
from common import (
    assert_all_close,
    batch,
    expert_inputs,
    gradients,
    naive_experts,
    noise_,
    relative,
    tiny_config,
)
from conftest import ROOT
from loop.log import watch_experts
from model import GPTOSS, IGNORED

# --------------------------------------------------------------------------------------------------
# Every pair


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def router_case(tokens=19):
    return [normal(tokens, 24, seed=0), normal(7, 24, seed=1), normal(7, seed=2)]


def experts_case(N=33, k=3, used=range(7)):
    """Seven experts, of which only those in `used` are chosen."""
    chosen, gates, x, *parameters, _ = expert_inputs(N, k, list(used), torch.float32)
    return [x, chosen, gates, *parameters, 0.9]


def loss_case(ignored=slice(None, None, 4), last=()):
    targets = torch.randint(104, (37,), generator=torch.Generator().manual_seed(3))
    targets[ignored] = IGNORED
    return [normal(37, 24, seed=4), normal(104, 24, seed=5) / 4, targets, *last]


CASES = {  # definition's name: {case: inputs}. A pair without a case is an error
    "router_logits": {"": router_case(), "one token": router_case(1)},
    "experts": {
        "all used": experts_case(),
        "four unused": experts_case(13, 2, [1, 4, 5]),
        "all on one": experts_case(17, 1, [3]),
        "one token, every expert": experts_case(1, 7),
    },
    "logprobs": {
        "": loss_case(last=[1.0]),
        "none counted": loss_case(slice(None), [1.0]),
        "temperature": loss_case(last=[0.6]),
    },
    "logprobs_and_entropy": {"": loss_case(last=[1.0]), "temperature": loss_case(last=[1.7])},
    "mean_loss": {
        "": loss_case(last=[None, torch.tensor(27.0)]),
        "none counted": loss_case(slice(None), [None, torch.tensor(1.0)]),
        "weights": loss_case(last=[normal(37, seed=7), torch.tensor(27.0)]),
    },
}
ALL_CASES = [(name, case) for name in CASES for case in CASES[name]]
SMALL_TILES = {"EXPERT_TOKENS": 9, "LOSS_TOKENS": 8}  # that divide no number of tokens above


def test_every_pair_has_a_case():
    """tests/test_lora_experts.py has that of frozen.py."""
    ours = {name for name, (f, _) in fast.PAIRS.items() if f.__module__ == "model"}
    assert CASES.keys() == ours


def is_fp32(name, place):
    """Gates, weights and counts are fp32 whatever the dtype of the model."""
    return (name, place) in (("experts", 2), ("mean_loss", 3), ("mean_loss", 4))


def outcome(name, function, inputs, dtype, device="cpu", recomputed=False, frozen=()):
    """{"out" or the place of an input: output or gradient} of a definition or twin."""
    leaves = []
    for place, x in enumerate(inputs):
        if torch.is_tensor(x):
            x = x.detach().to(device, copy=True)
            if x.is_floating_point():
                keep = is_fp32(name, place) and dtype != torch.float64
                x = x.to(torch.float32 if keep else dtype)
                x.requires_grad_(place not in frozen and x.dim() > 0)
        leaves.append(x)
    definition = function is fast.PAIRS[name][0]
    with fast.plain() if definition else nullcontext():  # mean_loss calls logprobs
        if recomputed:
            out = fast.recomputed(function, *leaves, keep_attention=False)
        else:
            out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [normal(*o.shape, seed=6 + i).to(device, o.dtype) for i, o in enumerate(outs)]
    torch.autograd.backward(outs, grads)
    found = {i: x.grad for i, x in enumerate(leaves) if torch.is_tensor(x) and x.requires_grad}
    return {"out": torch.stack(outs).detach(), **found}


def exact(name, inputs, device="cpu"):
    return outcome(name, fast.PAIRS[name][0], inputs, torch.float64, device)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name, case", ALL_CASES)
def test_a_twin_computes_what_its_definition_says(name, case, recomputed, tiled, monkeypatch):
    if tiled:
        for constant, size in SMALL_TILES.items():
            monkeypatch.setattr(fast, constant, size)
    inputs = CASES[name][case]
    actual = outcome(name, fast.PAIRS[name][1], inputs, torch.float32, recomputed=recomputed)
    assert_all_close(actual, exact(name, inputs), 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name, case", ALL_CASES)
def test_a_twin_on_a_gpu(name, case, recomputed, tiled, dtype, monkeypatch):
    """Compiled. In fp32 exact to 1e-5; in bf16 as exact as the definition in bf16, where a tenth
    more makes a tie a tie."""
    if tiled:
        for constant, size in SMALL_TILES.items():
            monkeypatch.setattr(fast, constant, size)
    definition, twin = fast.PAIRS[name]
    inputs = [
        x.to(dtype).float() if torch.is_tensor(x) and x.is_floating_point() else x
        for x in CASES[name][case]
    ]
    truth = outcome(name, definition, inputs, torch.float64, "cuda")
    plain = outcome(name, definition, inputs, dtype, "cuda")
    actual = outcome(name, twin, inputs, dtype, "cuda", recomputed)
    for what in truth:
        ours, theirs = relative(actual[what], truth[what]), relative(plain[what], truth[what])
        # so few numbers may differ by a unit in the last place
        least = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
        assert ours <= max(1.1 * theirs, least), f"{what}: {ours:.1e} and {theirs:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_frozen_inputs_get_no_gradient_and_change_no_other(name):
    """Each input frozen alone: LoRA's base, for example."""
    inputs = next(iter(CASES[name].values()))
    truth = exact(name, inputs)
    for place in sorted(truth.keys() - {"out"}):
        actual = outcome(name, fast.PAIRS[name][1], inputs, torch.float32, frozen=[place])
        assert place not in actual
        assert_all_close(actual, {k: v for k, v in truth.items() if k != place}, 1e-5)


class Counted(TorchDispatchMode):
    """Counts calls of matmuls, the grouped ones too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += bool(re.search(r"\b(addmm_?|mm|_grouped_mm)\b", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, frozen, spared", [("experts", (3, 4, 5, 6), 4), ("mean_loss", (1,), 1),
                             ("logprobs", (1,), 1), ("router_logits", (1, 2), 1)]
)  # fmt: skip
def test_nothing_is_computed_for_frozen_weights(name, frozen, spared):
    """Two grouped matmuls and two for the biases of the experts; one of every other pair."""
    inputs, counts = next(iter(CASES[name].values())), []
    for places in ((), frozen):
        with Counted() as counted:
            outcome(name, fast.PAIRS[name][1], inputs, torch.float32, frozen=places)
        counts.append(counted.count)
    assert counts[0] - counts[1] == spared


@pytest.mark.parametrize("name", CASES)
def test_a_second_derivative_is_the_definitions(name):
    """The gradient of a squared norm of gradients."""

    def second(function, dtype):
        leaves = list(next(iter(CASES[name].values())))
        for place, x in enumerate(leaves):
            if torch.is_tensor(x) and x.is_floating_point():
                leaves[place] = x.detach().to(dtype, copy=True)
        wanted = [x.requires_grad_() for x in leaves if torch.is_tensor(x) and x.dim() > 0
                  and x.is_floating_point()]  # fmt: skip
        outs = function(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        ones = [torch.ones_like(out) for out in outs]
        grads = torch.autograd.grad(outs, wanted, ones, create_graph=True)
        norm = sum(g.square().sum() for g in grads)
        found = torch.autograd.grad(norm, wanted, allow_unused=True)
        return {i: g for i, g in enumerate(found) if g is not None}

    definition, twin = fast.PAIRS[name]
    assert_all_close(second(twin, torch.float32), second(definition, torch.float64), 1e-4)


# --------------------------------------------------------------------------------------------------
# The switch


def step(model):
    """{loss, logprobs, and the gradients of both}"""
    tokens, targets = batch(model.config, 2, 29)
    model.zero_grad()
    loss, logprobs = model(tokens, targets), model.logprobs(tokens, targets)
    (loss + logprobs.mean()).backward()
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), **gradients(model)}


def forbid_twins(monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a fast twin ran")

    for name, (definition, _) in list(fast.PAIRS.items()):
        monkeypatch.setitem(fast.PAIRS, name, (definition, forbidden))
    monkeypatch.setattr(fast, "add_matmul_", forbidden)
    for name in ("block_mask", "plan_documents"):
        monkeypatch.setattr(flash, name, forbidden)
    for leaf in fast.SWITCHES - fast.PAIRS.keys():  # all but the model's own functions
        for module in fast, flash:
            if hasattr(module, leaf):
                monkeypatch.setattr(module, leaf, forbidden)


@pytest.mark.parametrize("recompute", ["none", "attention", "all"])
def test_the_model_is_complete_without_its_twins(recompute, monkeypatch):
    """Loss, logprobs and every gradient. The backward may lie outside of plain()."""
    model = noise_(GPTOSS(tiny_config(), recompute))
    expected = step(model)
    forbid_twins(monkeypatch)
    with fast.plain():
        actual = step(model)
    assert_all_close(actual, expected, 1e-5)
    with fast.plain():
        loss = model(*batch(model.config, 2, 29))
    model.zero_grad()
    loss.backward()
    with pytest.raises(AssertionError, match="a fast twin ran"):
        step(model)


def test_switches_by_name():
    model, tokens = noise_(GPTOSS(tiny_config())), batch(tiny_config(), 1, 9)
    ran = []
    original = dict(fast.PAIRS)
    try:
        for name, (definition, twin) in original.items():
            fast.PAIRS[name] = (
                definition,
                functools.partial(
                    lambda name, twin, *args: ran.append(name) or twin(*args), name, twin
                ),
            )
        with fast.plain("experts"):
            model(*tokens)
        assert set(ran) == {"router_logits", "mean_loss"}
        ran.clear()
        model(*tokens)
        assert set(ran) == {"router_logits", "mean_loss", "experts"}
    finally:
        fast.PAIRS.update(original)
    with pytest.raises(ValueError, match="plain: expert: not in"), fast.plain("expert"):
        pass


def test_every_compiled_leaf_is_a_switch():
    files = "model.py", "fast.py", "flash.py", "frozen.py", "generate.py"
    leaves = [re.findall(r"^@fused\ndef (\w+)", (ROOT / file).read_text(), re.MULTILINE)
              for file in files]  # fmt: skip
    assert min(map(len, leaves)) >= 1
    kernels = {"cudnn_sink_attention", "document_attention"}
    assert {*sum(leaves, []), *fast.PAIRS} | kernels == fast.SWITCHES


def test_constants_agree():
    assert fast.IGNORED == model_module.IGNORED


def test_sizes_that_grouped_matmuls_cannot_do(capsys):
    """Said once, and computed by definition; tests/test_model.py compares with transformers."""
    fast.say.cache_clear()
    model = noise_(GPTOSS(tiny_config(hidden_size=22, intermediate_size=13)))
    for _ in range(2):
        loss = model(*batch(model.config, 2, 9))
    loss.backward()
    said = [line for line in capsys.readouterr().out.splitlines() if "experts" in line]
    assert len(said) == 1 and "hidden_size=22, intermediate_size=13 in torch.float32" in said[0]


def test_fp64(capsys):
    """A model in fp64 computes in fp64: it runs as defined."""
    fast.say.cache_clear()
    model = noise_(GPTOSS(tiny_config()))
    exact = copy.deepcopy(model).double()
    with fast.plain():
        expected = step(exact)
    assert_all_close(step(exact), expected, 1e-12)
    assert_all_close(step(model), expected, 1e-5)
    assert "the model is in fp64" in capsys.readouterr().out


def test_the_loss_in_fp16_is_the_definitions(capsys):
    """Its gradient, made in the forward, would underflow before a loss scale multiplies it."""
    fast.say.cache_clear()
    x, unembedding, targets, *_ = loss_case()
    x = x.half().requires_grad_()
    count = torch.tensor(2.0**24)
    loss = model_module.mean_loss(x, unembedding.half(), targets, None, count)
    (loss * 2.0**24).backward()
    assert x.grad.count_nonzero() > x.numel() / 2
    assert "fp16" in capsys.readouterr().out


def test_autocast(capsys):
    """The model in fp32 under torch.autocast: as exact as the model in bf16."""
    fast.say.cache_clear()
    config = tiny_config(hidden_size=24, intermediate_size=16)
    model, (tokens, targets) = noise_(GPTOSS(config)), batch(config, 2, 29)
    truth = step(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets)
        logprobs = model.logprobs(tokens, targets)
    (loss + logprobs.mean()).backward()
    assert relative(loss, truth["loss"]) <= 1e-2
    assert_all_close(gradients(model), {n: truth[n] for n in gradients(model)}, 0.2)
    assert "torch.autocast is on" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Experts, router, loss: what they save


@pytest.mark.parametrize("tile", [1 << 15, 5])
@pytest.mark.parametrize("keep_hidden", [True, False])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    "N, k, used",
    [(33, 3, range(7)), (13, 2, [1, 4, 5]), (17, 1, [3]), (1, 7, range(7))],
    ids=["all used", "four unused", "all on one", "one token, every expert"],
)
def test_experts_against_a_loop(N, k, used, dtype, tolerance, keep_hidden, tile, monkeypatch):
    """Token by token in fp64: no token is dropped, no row is out of place."""
    monkeypatch.setattr(fast, "EXPERT_TOKENS", tile)
    experts, weights, x, *parameters, grad = expert_inputs(N, k, list(used), dtype)
    names, outputs = ["x", "weights", "w1", "b1", "w2", "b2"], []
    for function, last in (
        (fast.ExpertsFunction.apply, (0.9, keep_hidden)),
        (naive_experts, (0.9,)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, weights, *parameters)]
        if function is naive_experts:
            leaves = [t.detach().double().requires_grad_() for t in leaves]
        out = function(leaves[0], experts, *leaves[1:], *last)
        outputs.append(
            {"out": out, **dict(zip(names, torch.autograd.grad(out, leaves, grad.to(out.dtype))))}
        )
    actual, expected = outputs
    assert (
        actual["out"].dtype == actual["w1"].dtype == dtype
        and actual["weights"].dtype == torch.float32
    )
    assert_all_close(actual, expected, tolerance)
    unused = sorted(set(range(7)) - set(used))
    assert all((actual[name][unused] == 0).all() for name in ["w1", "b1", "w2", "b2"])


@pytest.mark.parametrize("recompute, runs", [("none", 6), ("all", 7)])
def test_experts_run_no_more_often_than_they_must(recompute, runs, monkeypatch):
    """Two matmuls forward and four backward; recomputation repeats the first, and its replay runs
    none. Tokens per expert are counted once."""
    calls, grouped_mm = [], F.grouped_mm

    def counted(*args, **kwargs):
        calls.append(args)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(fast.F, "grouped_mm", counted)
    model = noise_(GPTOSS(tiny_config(), recompute))
    watch_experts(model)
    model(*batch(model.config, 2, 9)).backward()
    assert len(calls) == runs * 3  # layers
    loads = [block.mlp.router.load for block in model.blocks]
    assert all(load.shape == (5,) and load.sum() == 2 * 9 * 2 for load in loads)


def test_router():
    """Logits are fp32 whatever comes in, and no fp32 copy of the tokens is kept."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(shape, generator=generator).bfloat16().requires_grad_()
        for shape in [(19, 24), (5, 24), (5,)]
    ]
    kept, grad = [], torch.randn(19, 5, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x):
        logits = fast.RouterLogits.apply(*leaves)
    assert logits.dtype == torch.float32 and kept == [torch.bfloat16] * 2
    with fast.plain():
        defined = model_module.router_logits(*leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = F.linear(*exact)
    assert relative(logits, expected) <= 1e-6 and relative(defined, expected) <= 1e-6
    for found, wanted in zip(
        torch.autograd.grad(logits, leaves, grad),
        torch.autograd.grad(expected, exact, grad.double()),
    ):
        assert found.dtype == torch.bfloat16 and relative(found, wanted) <= 3e-3


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_second_backward(recompute):
    """Through one graph, kept for it: the gradients of both add up."""
    model = noise_(GPTOSS(tiny_config(), recompute))
    loss = model(*batch(model.config, 2, 29))
    loss.backward(retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients(model).items()}
    loss.backward()
    assert_all_close(gradients(model), {name: 2 * grad for name, grad in once.items()}, 1e-6)


def test_a_block_that_reads_the_replayed_experts_fails_loudly():
    """The replay skips the experts, because they come last in a block. Where they do not, NaN."""
    experts = fast.PAIRS["experts"][1]

    def not_last(x, *args):
        return experts(x, *args).square()

    inputs = CASES["experts"]["all used"]
    found = outcome("experts", not_last, inputs, torch.float32, recomputed=True)
    assert found["out"].isfinite().all() and found[0].isnan().any()


@pytest.mark.parametrize("keep_blocks", [0, 1, 2, 3, 4])
def test_kept_blocks(keep_blocks):
    """The last blocks run once, the others again in the backward; gradients are equal bitwise."""
    twin, model = noise_(GPTOSS(tiny_config())), noise_(GPTOSS(tiny_config(), "all", keep_blocks))
    runs = [0] * 3
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(
            lambda *_, number=number: runs.__setitem__(number, runs[number] + 1)
        )
    for m in twin, model:
        m(*batch(m.config, 2, 29)).backward()
    assert runs == [1 if number >= 3 - keep_blocks else 2 for number in range(3)]
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(model).values(), gradients(twin).values())
    )


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, in the backward too."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize(
    "what", ["loss", "weighted loss", "loss without gradient", "logprobs", "entropy", "logits"]
)
def test_logits_never_exist_whole(what, monkeypatch):
    monkeypatch.setattr(fast, "LOSS_TOKENS", 32)
    B, S, V, C = 10, 21, 1500, 12
    model = noise_(GPTOSS(tiny_config(vocab_size=V, hidden_size=C, num_hidden_layers=1)))
    tokens, targets = batch(model.config, B, S)
    with Largest() as largest:
        if what == "loss":
            model(tokens, targets).backward()
        elif what == "weighted loss":
            model(tokens, targets, weights=torch.ones(B, S)).backward()
        elif what == "loss without gradient":
            with torch.no_grad():
                model(tokens, targets)
        elif what in ("logprobs", "entropy"):
            found = model.logprobs(tokens, targets, entropy=what == "entropy")
            sum(torch.as_tensor(x).sum() for x in found).backward()
        else:
            model(tokens)  # the measurement sees them where they are
    few_rows = 32 * V  # more than the parameters and their gradients: V C
    assert largest.numel == (B * S * V if what == "logits" else few_rows)
