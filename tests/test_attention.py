"""flash.py: which kernel runs, cuDNN's kernel with sinks, FlexAttention and its block
mask."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask

import fast
import flash
import model as model_module
from common import (
    assert_all_close,
    attention_inputs,
    attention_without_sinks,
    batch,
    gradients,
    noise_,
    packed,
    relative,
    tiny_config,
)
from flash import block_mask
from model import GPTOSS, dense_attention


def test_the_choice_of_attention_is_said_once(capsys):
    fast.say.cache_clear()
    model = noise_(GPTOSS(tiny_config()))
    for _ in range(2):
        model(torch.zeros(1, 3, dtype=torch.int64))
    said = capsys.readouterr().out.splitlines()
    assert [
        sum(f"{layers} layers: dense" in line for line in said) for layers in ("window 7", "full")
    ] == [1, 1]
    assert len(said) == 2


def flash_gradients(grad, q, k, v, out, lse):
    """(dq, dk, dv) of attention without sinks; shapes (B, heads, S, D), lse (B, H, S, 1). Like any
    flash kernel's backward it trusts the out and lse that it is given."""
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    weights = (q @ keys.mT * scale - lse).exp().tril()  # (B, H, S, S)
    dscores = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dscores.mT @ q, weights.mT @ grad))
    return dscores @ keys, dk, dv


class PlainCudnn:
    """cuDNN's attention op in plain tensor operations, with results in the inputs' layout. It takes
    what the kernel takes: lse without gaps, and the sizes and the state of its own forward."""

    def __init__(self):
        self.forwards = 0

    def forward(self, q, k, v, bias, compute_lse, is_causal):
        self.forwards += 1
        assert bias is None and compute_lse and is_causal
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        out, lse = attention_without_sinks(*(x.transpose(1, 2) for x in (q, k, v)))
        S, debug = q.shape[2], torch.zeros(())
        seed, offset = torch.tensor([S, 2 * S])
        return torch.empty_like(q).copy_(out), lse[..., None], None, None, S, S, seed, offset, debug

    def backward(self, *arguments):
        inputs, (seed, offset, bias, *lengths, dropout, is_causal) = arguments[:6], arguments[6:]
        S, lse = inputs[1].shape[2], inputs[5]
        assert bias is None and is_causal and dropout == 0
        assert lengths == [None, None, S, S] and (seed, offset) == (S, 2 * S)
        assert lse.is_contiguous() and lse.shape == (*inputs[1].shape[:3], 1)
        assert all(x.stride(-1) == 1 for x in inputs[1:5])
        found = flash_gradients(*inputs)
        return tuple(torch.empty_like(x).copy_(dx) for x, dx in zip(inputs[1:4], found))


@pytest.fixture
def plain_cudnn(monkeypatch):
    op = PlainCudnn()
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", op.forward)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward", op.backward)
    return op


def test_cudnn_sink_attention(plain_cudnn):
    """Given a logsumexp that includes the sink, a backward without sinks gives exact gradients."""
    inputs, grad = attention_inputs()
    expected, actual = dense_attention(*inputs), flash.CudnnSinkAttention.apply(*inputs)
    assert relative(actual, expected) <= 1e-6
    wanted = dict(zip(["q", "k", "v", "sinks"], torch.autograd.grad(expected, inputs, grad)))
    assert_all_close(
        dict(zip(["q", "k", "v", "sinks"], torch.autograd.grad(actual, inputs, grad))), wanted, 1e-6
    )


Q = 2 * 23 * 6 * 4  # numbers in q


@pytest.mark.parametrize("most, calls", [(8 * Q, 1), (8 * Q - 1, 3), (1, 3)])
def test_cudnn_attention_in_groups_of_heads(most, calls, plain_cudnn, monkeypatch):
    """Of 3 key-value heads, which 2 does not divide: the gradients of one call, in its layout."""
    monkeypatch.setattr(fast, "ATTENTION_BYTES", most)
    sizes, backward = [], plain_cudnn.backward
    run = "_scaled_dot_product_cudnn_attention_backward"
    monkeypatch.setattr(torch.ops.aten, run, lambda *x: sizes.append(x[1].numel()) or backward(*x))
    inputs, grad = attention_inputs()
    expected = torch.autograd.grad(dense_attention(*inputs), inputs, grad)
    actual = torch.autograd.grad(flash.CudnnSinkAttention.apply(*inputs), inputs, grad)
    assert sizes == calls * [Q // calls]
    names = "q", "k", "v", "sinks"
    assert_all_close(dict(zip(names, actual)), dict(zip(names, expected)), 1e-6)
    assert calls == 1 or all(dx.is_contiguous() for dx in actual)


@pytest.mark.parametrize("recompute, runs", [("none", 1), ("attention", 1), ("all", 2)])
def test_kept_attention(recompute, runs, plain_cudnn, monkeypatch):
    """recompute="attention" runs a full layer's attention once and gives the same gradients."""
    config = tiny_config(num_hidden_layers=4)
    twin = noise_(GPTOSS(config))
    tokens, targets = batch(config, 2, 21)
    twin(tokens, targets).backward()

    def choose(S, window, *rest):
        return (
            flash.CudnnSinkAttention.apply if window is None else choose_attention(S, window, *rest)
        )

    choose_attention = model_module.choose_attention
    monkeypatch.setattr(model_module, "choose_attention", choose)
    model = noise_(GPTOSS(config, recompute))
    model(tokens, targets).backward()
    assert plain_cudnn.forwards == 2 * runs  # two full layers
    assert_all_close(gradients(model), gradients(twin), 1e-5)


@torch.no_grad()
@pytest.mark.slow
def test_flex_attention_stays_below_the_recompile_limit():
    """FlexAttention compiled as on a GPU, but for the backend, in a session of calls that all
    differ: the recompile limit, an error with fullgraph, is not reached, and compilation ends."""
    torch._dynamo.reset()
    attention = torch.compile(
        model_module.flex_sink_attention.__wrapped__, fullgraph=True, backend="aot_eager"
    )
    stats = torch._dynamo.utils.counters["stats"]

    def session(lengths):
        for dtype, B, S, window in itertools.product(
            (torch.float32, torch.bfloat16), (1, 2, 3), lengths, (16, None)
        ):
            q, k, v = (torch.randn(B, S, heads, 16, dtype=dtype) for heads in (4, 2, 2))
            out = attention(q, k, v, torch.zeros(4), block_mask(S, window, None, q.device))
            assert relative(out, dense_attention(q, k, v, torch.zeros(4), window)) < (
                1e-6 if dtype == torch.float32 else 1e-2
            )
        return stats["unique_graphs"]

    before = stats["unique_graphs"]
    compiled = session([130, 200, 70, 300, 31])
    assert compiled - before > 8
    assert session([150, 257, 90, 511]) == compiled


def true_mask(S, window, documents):
    distance = torch.arange(S)[:, None] - torch.arange(S)
    mask = (distance >= 0) & (distance < (window or S))
    return (
        mask[None] if documents is None else mask & (documents[:, :, None] == documents[:, None])
    )  # (B, S, S)


def listed_blocks(mask):
    """(masked, fully visible) blocks: two (B, blocks, blocks) masks from a BlockMask's lists."""
    dense = []
    for counts, numbers in (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        listed = (
            torch.arange(numbers.shape[-1]) < counts[..., None]
        )  # the first `count` numbers of a row
        times = torch.zeros(numbers.shape, dtype=torch.int64).scatter_add_(
            -1, numbers.long(), listed.long()
        )
        assert times.max() <= 1  # none is listed twice
        dense.append(times[:, 0].bool())
    return dense


DOCUMENTS = {
    "none": None,
    "in order": lambda S, g: torch.sort(torch.randint(4, (2, S), generator=g)).values,
    "in reverse": lambda S, g: (
        torch.sort(torch.randint(4, (2, S), generator=g), descending=True).values
    ),
    "in no order": lambda S, g: torch.stack(
        [packed([S // 3, S - S // 3 - S // 4, S // 4], [x, 9, 1]) for x in (40, -3)]
    ),
    "interleaved, int32": lambda S, g: torch.randint(3, (2, S), generator=g).int(),
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize(
    "S, block", [(1, 16), (31, 16), (64, 16), (101, 16), (128, 128), (300, 128)]
)
def test_block_mask(S, block, documents):
    """The lists and the mask function together are the mask. Unless document numbers go up and
    down, no block is visited or masked needlessly, and torch's own block mask, made from all
    S x S scores, has the same lists."""
    exact = documents in ("none", "in order", "in reverse")
    documents = DOCUMENTS[documents] and DOCUMENTS[documents](S, torch.Generator().manual_seed(S))
    B, blocks = 1 if documents is None else 2, math.ceil(S / block)
    for window in (
        None,
        1,
        block - 1,
        block,
        block + 1,
        2 * block - 1,
        2 * block,
        2 * block + 1,
        10 * S,
    ):
        mask = block_mask(S, window, documents, torch.device("cpu"), block)
        assert (mask.seq_lengths, mask.BLOCK_SIZE) == ((S, S), (block, block))
        partial, whole = listed_blocks(mask)
        truth = true_mask(S, window, documents)
        scores = create_mask(mask.mask_mod, B, 1, S, S, device="cpu")[:, 0]
        wide = [
            pairs.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :S, :S]
            for pairs in (partial, whole)
        ]
        assert not (partial & whole).any()
        assert torch.equal((wide[0] & scores) | wide[1], truth)
        padded = (
            F.pad(truth, (0, blocks * block - S) * 2)
            .unflatten(2, (blocks, block))
            .unflatten(1, (blocks, block))
        )
        if exact:
            assert torch.equal(partial | whole, padded.any(4).any(2))
            assert torch.equal(whole, padded.all(4).all(2))
        if exact and window in (None, block + 1):
            theirs = listed_blocks(
                create_block_mask(mask.mask_mod, B, None, S, S, "cpu", BLOCK_SIZE=block)
            )
            assert torch.equal(partial, theirs[0]) and torch.equal(whole, theirs[1])


# --------------------------------------------------------------------------------------------------
# Packed documents


class PlainFlash:
    """FlashAttention's op for many lengths, a document at a time. See PlainCudnn."""

    def __init__(self):
        self.calls = []

    def forward(self, q, k, v, ends, ends_k, longest, longest_k, dropout, causal, debug):
        assert ends is ends_k and longest == longest_k == ends.diff().max() and causal
        assert ends.dtype == torch.int32 and not dropout and not debug
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        self.calls.append(ends.diff().tolist())
        parts = [
            attention_without_sinks(*(x[None, begin:end] for x in (q, k, v)))
            for begin, end in itertools.pairwise(ends.tolist())
        ]
        out = torch.cat([out[0].transpose(0, 1) for out, _ in parts])  # (T, H, D)
        lse = torch.cat([lse[0] for _, lse in parts], dim=1)  # (H, T)
        return out, lse, torch.zeros(2), torch.zeros(()), None

    def backward(
        self, grad, q, k, v, out, lse, ends, _, longest, __, dropout, causal, state, unused
    ):
        assert state.shape == (2,) and unused.shape == () and causal and not dropout
        assert longest == ends.diff().max() and ends[-1] == len(q)
        assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
        parts = []
        for begin, end in itertools.pairwise(ends.tolist()):
            inputs = (x[begin:end].transpose(0, 1)[None] for x in (grad, q, k, v, out))
            found = flash_gradients(*inputs, lse[None, :, begin:end, None])
            parts.append([x[0].transpose(0, 1) for x in found])
        return tuple(torch.cat(x) for x in zip(*parts))


@pytest.fixture
def plain_flash(monkeypatch):
    op = PlainFlash()
    monkeypatch.setattr(flash, "SHORTEST", 1)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op.forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", op.backward)
    return op


LENGTHS = [[1, 9, 1, 4, 8], [23]], [[2, 5, 3, 5, 1, 7], [7, 5, 11]], [[23], [23]], [[23]]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("long", [2, 6, 9, 100])
@pytest.mark.parametrize("lengths", LENGTHS, ids=["1 to 23", "1 to 11", "whole", "one"])
def test_document_attention(lengths, long, groups, plain_cudnn, plain_flash, monkeypatch):
    """Each document on one kernel or the other, padded or not: outputs and gradients. A byte short
    of what it works in, the backward runs in groups of heads."""
    monkeypatch.setattr(flash, "LONG", long)
    of = [n for each in lengths for n in each]
    padding = 4 * 128 * 6 * 4 * sum(n < long for n in of)  # FlashAttention's, in fp32
    inputs, grad = attention_inputs(B=len(lengths))
    size = 16 * inputs[0].numel() + padding
    monkeypatch.setattr(fast, "ATTENTION_BYTES", size - (groups > 1))
    heads = []  # of each call of a kernel's backward, whose q is (..., heads, tokens or D, D)

    def counted(kernel):
        return lambda *x: heads.append(x[1].shape[-3 if x[1].dim() == 4 else -2]) or kernel(*x)

    for name in "_scaled_dot_product_cudnn_attention_backward", "_flash_attention_backward":
        monkeypatch.setattr(torch.ops.aten, name, counted(getattr(torch.ops.aten, name)))
    documents = torch.stack([packed(each, list(range(len(each)))) for each in lengths])
    plan = flash.plan_documents(documents)
    on_cudnn = [call.tokens for call in plan if call.forward is flash.on_cudnn]
    assert [each.stop - each.start for each in on_cudnn] == [n for n in of if n >= long]
    assert on_cudnn or [call.tokens for call in plan] == [slice(None)], "all: nothing is gathered"
    expected = dense_attention(*inputs, documents=documents)
    actual = flash.document_attention(*inputs, plan=plan)
    assert plain_flash.calls == [[n for n in of if n < long]] * (min(of) < long)
    assert relative(actual, expected) <= 1e-6
    names = "q", "k", "v", "sinks"
    wanted = dict(zip(names, torch.autograd.grad(expected, inputs, grad)))
    assert_all_close(dict(zip(names, torch.autograd.grad(actual, inputs, grad))), wanted, 1e-6)
    assert heads == groups * len(plan) * [6 // groups]  # query heads; 3 key-value heads


def test_documents_are_not_copied_in_vain():
    """Not one that needs no padding, which has the strides of a sequence on cuDNN; and what a
    single call returns is the whole."""
    x = torch.randn(16, 6, 4)[:8, 2:4]  # a group of heads
    alone = flash.one_sequence(x, 8)
    assert alone.data_ptr() == x.data_ptr() and alone.shape == (1, 2, 8, 4)
    assert alone.stride() == x[None].transpose(1, 2).stride()
    assert flash.one_sequence(x, 9).stride() == (72, 36, 4, 1)
    parts = x, x[..., 0]
    assert flash.put(None, parts, slice(None), 8) is parts


def test_padded_lengths():
    assert [flash.padded(n) for n in (1, 7, 8, 9, 17, 8192, 8193)] == [1, 7, 8, 9, 18, 8192, 9216]
    sizes = {flash.padded(n) for n in range(8192, 65537)}
    assert len(sizes) == 3 * flash.SIZES + 1 and all(n % 8 == 0 for n in sizes)
    assert all(n <= flash.padded(n) < 1.125 * n + 1 for n in range(1, 5000))


def test_numbers_that_come_again(monkeypatch):
    """A token sees its document's earlier part across another: not a causal sequence."""
    monkeypatch.setattr(flash, "SHORTEST", 1)
    assert flash.plan_documents(torch.tensor([[0, 0, 1, 1, 0]])) is None
    assert flash.plan_documents(torch.tensor([[0, 0, 1], [1, 0, 2]])) is not None


@pytest.mark.parametrize("recompute, runs", [("none", 1), ("attention", 1), ("all", 2)])
def test_kept_attention_of_documents(recompute, runs, plain_cudnn, plain_flash, monkeypatch):
    """As of plain sequences: once, and with the same gradients."""
    monkeypatch.setattr(flash, "LONG", 9)
    config = tiny_config(num_hidden_layers=4)
    twin = noise_(GPTOSS(config))
    tokens, targets = batch(config, 2, 21)
    documents = torch.stack([packed([10, 4, 7], [0, 1, 2]), packed([1, 15, 5], [0, 1, 2])])
    twin(tokens, targets, documents).backward()
    kernel = flash.choose_kernel
    monkeypatch.setattr(flash, "choose_kernel", lambda w, *x: kernel(w, *x) if w else "by document")
    model = noise_(GPTOSS(config, recompute))
    model(tokens, targets, documents).backward()
    assert len(plain_flash.calls) == 2 * runs  # two full layers
    assert_all_close(gradients(model), gradients(twin), 1e-5)


def test_choice_of_kernel(monkeypatch):
    """Which kernel layers run on a GPU, asked without one."""
    documents = torch.zeros(1, 8, dtype=torch.int64)

    def kernel(documents=documents, window=None, dtype=torch.bfloat16):
        return flash.choose_kernel(window, documents, torch.device("cuda"), dtype, 64)

    for trial in "_cudnn_fails", "_flash_fails":
        monkeypatch.setattr(flash, trial, lambda *_: None)
    assert (kernel(), kernel(None)) == ("by document", "cuDNN")
    assert kernel(window=7) == kernel(dtype=torch.float32) == "FlexAttention"
    with fast.plain("document_attention"):
        assert (kernel(), kernel(None)) == ("FlexAttention", "cuDNN")
    monkeypatch.setattr(flash, "_flash_fails", lambda *_: "it fails here")
    assert (kernel(), kernel(None)) == ("FlexAttention", "cuDNN")
    monkeypatch.setattr(flash, "_flash_fails", lambda *_: None)
    with fast.plain("cudnn_sink_attention"):
        assert kernel() == kernel(None) == "FlexAttention"


@pytest.mark.parametrize(
    "numbers, name, limits",
    [
        ([0, 0, 1], "document", {"SHORTEST": 1}),
        ([0, 1, 0], "flex_sink", {"SHORTEST": 1}),
        ([0, 0, 1], "flex_sink", {"SHORTEST": 2}),
        ([0, 0, 1], "flex_sink", {"SHORTEST": 1, "MOST": 1}),
    ],
)
def test_documents_for_flex_attention(numbers, name, limits, monkeypatch):
    """Whose numbers come again, which are too short, and which are too many."""
    monkeypatch.setattr(flash, "choose_kernel", lambda *_: "by document")
    for limit, value in limits.items():
        monkeypatch.setattr(flash, limit, value)
    options = torch.device("cpu"), torch.bfloat16, 64
    found = model_module.choose_attention(3, None, torch.tensor([numbers]), *options)
    assert found.func.__name__ == f"{name}_attention"


def test_no_second_derivative_of_documents(plain_cudnn, plain_flash):
    inputs, grad = attention_inputs()
    plan = flash.plan_documents(torch.arange(23).expand(2, -1) // 7)
    out = flash.document_attention(*inputs, plan=plan)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out, inputs, grad, create_graph=True)
