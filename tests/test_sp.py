"""sp.py: one rank against two, four and eight, in fp32 over gloo.

Each number of ranks is started once and runs all its cases; the tests look at what came back. In
every case the loss is the sum of the ranks' losses and a gradient the sum of the ranks' gradients.
All sizes differ, so that no two can be mixed up."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh

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
from model import GPTOSS, IGNORED, dense_attention

B, S, H, D = 2, 40, 24, 14  # of 8 ranks: 5 tokens and 3 heads each
SIZES = {
    "num_attention_heads": H,
    "head_dim": D,
    "hidden_size": 28,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
}

# --------------------------------------------------------------------------------------------------
# The model, sequence-parallel


def straddling():
    """Documents, numbered in no order, that end inside slices; one spans three of eight slices."""
    return torch.stack([packed([3, 18, 1, 18], [4, 0, 9, 2]), packed([33, 7], [1, 5])])


def model_case(
    kv_heads=4, window=7, documents=False, recompute="none", masked=slice(0, 0), cotangents=False
):
    """A model and its batch, the same on every rank. masked: positions with ignored targets."""
    config = tiny_config(**SIZES, num_key_value_heads=kv_heads, sliding_window=window)
    tokens, targets = batch(config, B, S)
    targets[:, masked] = IGNORED
    targets[:, ::4] = torch.where(
        torch.arange(S)[::4] < S // 2, IGNORED, targets[:, ::4]
    )  # fewer count in the first half
    grad = torch.randn(B, S, generator=torch.Generator().manual_seed(9)) if cotangents else None
    return (
        noise_(GPTOSS(config, recompute)),
        tokens,
        targets,
        straddling() if documents else None,
        grad,
    )


def outcome(model, tokens, targets, documents, grad):
    """The loss, the logprobs, and the gradients of the loss, or of sum(grad * logprobs)."""
    logprobs, loss = model.logprobs(tokens, targets, documents), model(tokens, targets, documents)
    (loss if grad is None else (logprobs * grad).sum()).backward()
    return {"loss": loss.detach(), "logprobs": logprobs.detach(), "gradients": gradients(model)}


MODEL_CASES = {
    2: {
        "plain": {},
        "a kv head each": {"kv_heads": 2},
        "documents": {"documents": True},
        "recompute all": {"recompute": "all", "documents": True},
        "logprobs": {"cotangents": True, "kv_heads": 8},
        "a rank without targets": {"masked": slice(20, 40)},
    },
    4: {
        "plain": {},
        "two kv heads": {"kv_heads": 2},
        "two kv heads, documents": {"kv_heads": 2, "documents": True, "window": 17},
        "recompute attention": {"recompute": "attention", "kv_heads": 2},
        "logprobs": {"cotangents": True},
        "a rank without targets": {"masked": slice(0, 10)},
        "no targets": {"masked": slice(0, 40)},
    },
    8: {
        "plain": {"kv_heads": 8},
        "two kv heads": {"kv_heads": 2},
        "four kv heads, documents": {"documents": True, "recompute": "all"},
        "one kv head": {"kv_heads": 1, "window": 40},
        "ranks without targets": {"masked": slice(5, 20)},
    },
}


@functools.cache
def alone(n, case):
    return outcome(*model_case(**MODEL_CASES[n][case]))


def together(case):
    model, *tensors = model_case(**case)
    return outcome(model, *sp.shard(*tensors[:2]), *sp.shard(*tensors[2:]))


# --------------------------------------------------------------------------------------------------
# The pieces, on ranks. A check that fails raises, and the test shows its traceback.


def numbered(heads=H):
    """(B, S, heads, D), every element another number."""
    return torch.arange(B * S * heads * D, dtype=torch.float64).view(B, S, heads, D)


def check_layouts():
    n, r = sp.size(), sp.rank()
    whole = numbered()
    mine = sp.shard(whole)[0].clone().requires_grad_()
    h, s = H // n, S // n
    assert torch.equal(mine, whole[:, r * s : (r + 1) * s])
    heads = sp.seq_to_heads(mine)
    assert torch.equal(heads, whole[:, :, r * h : (r + 1) * h])
    assert torch.equal(sp.heads_to_seq(heads), mine)
    assert torch.equal(
        torch.autograd.grad(heads, mine, -whole[:, :, r * h : (r + 1) * h])[0], -mine
    )
    back = sp.heads_to_seq(heads.detach().requires_grad_())
    strided = (
        (2 * whole)[:, r * s : (r + 1) * s].transpose(1, 2).contiguous().transpose(1, 2)
    )  # as a backward may hand it
    (gradient,) = torch.autograd.grad(
        sp.heads_to_seq(leaf := heads.detach().requires_grad_()), leaf, strided
    )
    assert torch.equal(back, mine) and torch.equal(gradient, (2 * whole)[:, :, r * h : (r + 1) * h])


def check_shards():
    n, r = sp.size(), sp.rank()
    tokens = torch.arange(B * S).view(B, S)
    a, none, b = sp.shard(tokens, None, tokens[..., None] * torch.ones(3))
    assert none is None and b.shape == (B, S // n, 3)
    assert torch.equal(a, tokens[:, sp.positions(S // n)]) and torch.equal(b[..., 2], a.to(b.dtype))
    assert sp.positions(S // n).tolist() == list(range(r * S // n, (r + 1) * S // n))
    assert torch.equal(sp.gather_sequence(a), tokens)  # a is not contiguous
    assert torch.equal(sp.gather_sequence(a.int()), tokens.int())
    assert sp.all_reduce(torch.tensor(r + 1)).item() == n * (n + 1) // 2
    per_head = torch.arange(H * 3.0).view(H, 3).requires_grad_()
    mine = sp.local_heads(per_head)
    assert torch.equal(mine, per_head[r * H // n : (r + 1) * H // n])
    mine.sum().backward()
    assert (
        per_head.grad.sum() == 3 * H // n
        and (per_head.grad[r * H // n : (r + 1) * H // n] == 1).all()
    )


def check_repeated_kv():
    """Query head h reads key-value head h // (H/K), on its rank as in the whole."""
    n, r = sp.size(), sp.rank()
    for K in (1, 2, 8):
        kv = sp.seq_to_heads(sp.repeat_kv(sp.shard(numbered(K))[0]))
        for local, head in enumerate(range(r * H // n, (r + 1) * H // n)):
            assert torch.equal(
                kv[:, :, local // (H // n // kv.shape[2])], numbered(K)[:, :, head // (H // K)]
            )


def check_errors():
    n = sp.size()
    for call, message in [
        (
            lambda: sp.seq_to_heads(torch.zeros(1, 2, n + 1, 3)),
            f"sp={n} must divide the number of attention heads, {n + 1}",
        ),
        (
            lambda: sp.repeat_kv(torch.zeros(1, 2, n + 1, 3)),
            f"sp={n} must divide.*key-value heads, {n + 1}",
        ),
        (lambda: sp.repeat_kv(torch.zeros(1, 2, 3, 3)), f"sp={n} must divide.*key-value heads, 3"),
        (
            lambda: sp.shard(torch.zeros(2, n), torch.zeros(2, n + 1)),
            f"sp={n} must divide the sequence length, {n + 1}",
        ),
        (
            lambda: GPTOSS(tiny_config())(torch.zeros(1, 256, dtype=torch.int64)),
            f"{256 * n} tokens.*=256",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def plain_attention(q, k, v, sinks, mask):
    """An attention function that does not support sinks and takes the whole sequence's mask."""
    assert sinks is None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)


def attention_case(K):
    generator = torch.Generator().manual_seed(K)
    q, k, v, grad = (torch.randn(B, S, heads, D, generator=generator) for heads in (H, K, K, H))
    return q, k, v, 2 * torch.randn(H, generator=generator), grad


def check_wrapper(sent=1):
    """ulysses around other functions: outputs, gradients, arguments that pass through, and four
    all-to-alls of `sent` calls each."""
    mask = torch.rand(S, S, generator=torch.Generator().manual_seed(0)) < 0.5
    mask.fill_diagonal_(True)
    exchanges, all_to_all = [], dist.all_to_all_single
    dist.all_to_all_single = lambda *args, **kwargs: (
        exchanges.append(1),
        all_to_all(*args, **kwargs),
    )[1]
    for K in (2, 8):
        for attention, given, extra in (
            (plain_attention, False, {"mask": mask}),
            (dense_attention, True, {"window": 9}),
        ):
            calls = []

            def counting(q, k, v, sinks, attention=attention, calls=calls, **kwargs):
                calls.append((q.shape, k.shape, None if sinks is None else sinks.shape))
                return attention(q, k, v, sinks, **kwargs)

            *leaves, grad = attention_case(K)
            leaves = [x.requires_grad_() for x in leaves]
            q, k, v, sinks = leaves
            used = leaves if given else leaves[:3]
            expected = attention(q, k, v, sinks if given else None, **extra)
            wanted = torch.autograd.grad(expected, used, grad)
            exchanges.clear()
            out = sp.ulysses(counting)(*sp.shard(q, k, v), *([sinks] if given else []), **extra)
            assert len(exchanges) == 4 * sent
            actual = torch.autograd.grad(out, used, sp.shard(grad)[0])
            assert len(exchanges) == 8 * sent
            for gradient in actual:  # each rank has its tokens' and its heads' part
                dist.all_reduce(gradient, group=sp._group)
            n = sp.size()
            shapes = (B, S, H // n, D), (B, S, max(K, n) // n, D), (H // n,) if given else None
            assert calls == [shapes]
            assert relative(out, sp.shard(expected)[0]) <= 1e-6
            assert max(map(relative, actual, wanted)) <= 1e-5
    dist.all_to_all_single = all_to_all


def check_large_rows():
    """Rows that are sent one by one."""
    limit, sp.LARGE_BYTES = sp.LARGE_BYTES, 0
    check_layouts()
    check_shards()
    check_wrapper(sent=B)
    sp.LARGE_BYTES = limit


def check_backward_after_the_group():
    """The backward exchanges within the group of its forward, whichever is in force by then."""
    *leaves, grad = attention_case(2)
    leaves = [x.requires_grad_() for x in leaves]
    out = sp.ulysses(dense_attention)(*sp.shard(*leaves[:3]), leaves[3])
    cut = sp.shard(grad)[0]
    expected = torch.autograd.grad(out, leaves, cut, retain_graph=True)
    with sp.alone():
        actual = torch.autograd.grad(out, leaves, cut)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))


CHECKS = [
    check_layouts,
    check_shards,
    check_repeated_kv,
    check_errors,
    check_wrapper,
    check_large_rows,
    check_backward_after_the_group,
]


def wrong_sinks():
    """Every rank takes the first rank's slice."""
    right, sp.local_heads = sp.local_heads, lambda x: x[: x.shape[0] // sp.size()]
    result = together(MODEL_CASES[4]["plain"])
    sp.local_heads = right
    return result


def wrong_count():
    """Every rank divides by its own count; the mean of that over the ranks."""
    right, sp.all_reduce = sp.all_reduce, lambda x: x
    result = together(MODEL_CASES[4]["plain"])
    sp.all_reduce = right
    return {
        **result,
        "loss": result["loss"] / 4,
        "gradients": {name: g / 4 for name, g in result["gradients"].items()},
    }


def wrong_documents():
    """Every rank knows its own documents only."""
    right, sp.gather_sequence = sp.gather_sequence, lambda x: x.repeat(1, sp.size())
    result = together(MODEL_CASES[4]["two kv heads, documents"])
    sp.gather_sequence = right
    return result


def wrong_positions():
    """Every rank's tokens start at 0."""
    right, sp.positions = sp.positions, lambda s, device=None: torch.arange(s)
    result = together(MODEL_CASES[4]["plain"])
    sp.positions = right
    return result


MISTAKES = [wrong_sinks, wrong_count, wrong_documents, wrong_positions]


def on_a_rank(n):
    """Everything that n ranks do: {name: result}. For n < 8 the group is the second half of 2 n
    ranks, as with data parallelism, so that a rank's number in its group is not its number in the
    world."""
    groups = dist.get_world_size() // n
    mesh = init_device_mesh("cpu", (groups, n), mesh_dim_names=("dp", "sp"))["sp"]
    if dist.get_rank() < n * (groups - 1):
        return None
    sp.init(mesh)
    jobs = {name: functools.partial(together, case) for name, case in MODEL_CASES[n].items()}
    jobs |= {check.__name__: check for check in CHECKS}
    if n == 4:
        jobs |= {mistake.__name__: mistake for mistake in MISTAKES}
    results = {}
    for name, job in jobs.items():
        try:
            results[name] = job()
        except Exception as error:  # ends all ranks, which no longer agree on what comes next
            raise RuntimeError(f"{name}, {n} ranks") from error
    sp.init(None)
    assert (sp.size(), sp.rank()) == (1, 0)
    return results


@functools.cache
def ranks(n):
    """[{name: result} of each of the n ranks], or the traceback of the first failure."""
    try:
        return [
            results for results in run_ranks(min(2 * n, 8), on_a_rank, n) if results is not None
        ]
    except (RuntimeError, TimeoutError) as error:
        return str(error)


def results(n, name):
    if isinstance(ranks(n), str):
        pytest.fail(ranks(n), pytrace=False)
    return [rank[name] for rank in ranks(n)]


def summed(n, name):
    """The ranks' results as one: (loss, logprobs, gradients)."""
    parts = results(n, name)
    loss, logprobs = (
        sum(part["loss"] for part in parts),
        torch.cat([part["logprobs"] for part in parts], dim=1),
    )
    names = parts[0]["gradients"]
    return loss, logprobs, {name: sum(part["gradients"][name] for part in parts) for name in names}


# --------------------------------------------------------------------------------------------------
# Tests


@pytest.mark.parametrize(
    "n, case", [(n, case) for n, cases in MODEL_CASES.items() for case in cases]
)
def test_ranks_equal_one(n, case):
    loss, logprobs, grads = summed(n, case)
    expected = alone(n, case)
    assert len(ranks(n)) == n
    assert relative(loss, expected["loss"]) <= 1e-6
    assert relative(logprobs, expected["logprobs"]) <= 1e-6
    assert_all_close(grads, expected["gradients"], 1e-5)
    sinks = [name for name in grads if name.endswith("sinks")]
    assert len(sinks) == 2 and all(
        case == "no targets" or (grads[name] != 0).all() for name in sinks
    )


def test_cases_are_what_they_say():
    """Ranks without a target have none, and give no NaN; the others have unequal counts."""
    cases = (
        (2, "a rank without targets", [1]),
        (4, "a rank without targets", [0]),
        (8, "ranks without targets", [1, 2, 3]),
    )
    for n, case, empty in cases:
        _, _, targets, _, _ = model_case(**MODEL_CASES[n][case])
        counts = [(part != IGNORED).sum().item() for part in targets.chunk(n, dim=1)]
        assert [rank for rank, count in enumerate(counts) if count == 0] == empty and len(
            set(counts)
        ) > 1
        for rank in empty:
            assert results(n, case)[rank]["loss"] == 0
    assert alone(4, "no targets")["loss"] == 0


@pytest.mark.parametrize("n", MODEL_CASES)
@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_pieces(n, check):
    assert results(n, check) == [None] * n


@pytest.mark.parametrize("mistake", MISTAKES)
def test_comparison_sees(mistake):
    """Mistakes that public code has made: the comparison above fails by far."""
    loss, _, grads = summed(4, mistake.__name__)
    expected = alone(4, "two kv heads, documents" if mistake is wrong_documents else "plain")
    assert relative(loss, expected["loss"]) > 1e-4
    assert max(relative(grads[name], expected["gradients"][name]) for name in grads) > 1e-2


def test_without_a_group_all_is_the_identity():
    x, odd = numbered(), torch.zeros(1, 3)
    assert (sp.size(), sp.rank()) == (1, 0)
    for function in (
        sp.seq_to_heads,
        sp.heads_to_seq,
        sp.repeat_kv,
        sp.local_heads,
        sp.gather_sequence,
        sp.all_reduce,
    ):
        assert torch.equal(function(x), x)
    assert torch.equal(sp.shard(odd, None)[0], odd) and sp.shard(odd, None)[1] is None
    assert sp.positions(3).tolist() == [0, 1, 2]
    q, k, v, sinks, _ = attention_case(4)
    assert torch.equal(
        sp.ulysses(dense_attention)(q, k, v, sinks, window=3), dense_attention(q, k, v, sinks, 3)
    )
    assert sp.ulysses(dense_attention).__name__ == "dense_attention"
    sp.init(None)
    assert sp.size() == 1


def one_rank_mesh():
    sp.init(init_device_mesh("cpu", (1,)))
    return sp.size(), sp.rank(), sp._group


def test_a_mesh_of_one_is_no_group():
    assert run_ranks(1, one_rank_mesh) == [(1, 0, None)]


def fails_on_rank_one():
    if dist.get_rank() == 1:
        raise ValueError("seven apples")
    dist.barrier()  # never ends by itself


def test_a_failing_rank_ends_the_others():
    with pytest.raises(RuntimeError, match="ValueError: seven apples"):
        run_ranks(2, fails_on_rank_one)
