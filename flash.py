"""Attention that never holds S x S scores: the choice of a kernel, and the sinks and packed
documents that the kernels lack.

FlexAttention takes any mask, and is compiled for it. cuDNN's kernel is faster for a plain causal
mask. Within a packed document the mask is only causal too, so layers without a window run long
documents one by one on cuDNN's kernel, the others together on FlashAttention 2's, which takes
sequences of many lengths at once. cuDNN and FlashAttention do not support sinks:
CudnnSinkAttention shows how they are added.

Letters in shapes are model.py's; in packed documents, n tokens of one document or several.
"""

import functools
import math
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

import fast
from recompute import once
from switch import SWITCHES, fused, is_on, say


def choose_kernel(window, documents, device, dtype, head_dim):
    """The attention kernel of the layers with this window: "cuDNN", "by document", "FlexAttention"
    or "dense". Prints which, and why."""
    layers = f"window {window} layers" if window else "full layers"
    packed = " with packed documents" if documents is not None else ""
    if not is_on("flex_sink_attention"):
        kernel, why = "dense", "the fast kernels are switched off"
    elif device.type != "cuda" or head_dim < 16:
        kernel, why = "dense", "fused kernels need a GPU and head_dim of at least 16"
    elif dtype == torch.float64:
        kernel, why = "dense", "fused kernels have no fp64"
    elif window is not None:
        kernel, why = "FlexAttention", "the mask is more than causal"
    elif documents is not None and (refusal := documents_refused(device, dtype, head_dim)):
        kernel, why = "FlexAttention", f"documents cannot run one by one: {refusal}"
    elif documents is not None:
        kernel, why = "by document", f"cuDNN from {LONG} tokens on, FlashAttention below"
    elif refusal := cudnn_refuses(device, dtype, head_dim):
        kernel, why = "FlexAttention", f"cuDNN is not usable: {refusal}"
    else:
        kernel, why = "cuDNN", "fastest for a plain causal mask"
    say(f"attention of {layers}{packed}: {kernel} ({why})")
    return kernel


# --------------------------------------------------------------------------------------------------
# FlexAttention's block mask


def causal(b, h, q, k):
    return q >= k


@functools.cache  # one function per window
def sliding(window):
    return lambda b, h, q, k: (q >= k) & (q - k < window)


def within_documents(visible, documents):
    return lambda b, h, q, k: visible(b, h, q, k) & (documents[b, q] == documents[b, k])


def from_lowest(lowest):
    """lowest (B, S): the first key that each query sees. With one number to load per query this is
    as fast as a mask without documents; comparing document numbers takes a tenth longer."""
    return lambda b, h, q, k: (q >= k) & (k >= lowest[b, q])


def document_begins(documents):
    """documents (B, S) -> (B, S) bool, on the CPU: whether a document begins here. None if a number
    returns later in a sequence, so that its tokens do not all lie together. Waits for the GPU."""
    numbers = documents.cpu()
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0), value=True)
    found = torch.stack((begins.nonzero()[:, 0], numbers[begins].long()))  # (sequence, number)
    return begins if found.unique(dim=1).shape[1] == found.shape[1] else None


def block_mask(S, window, documents, device, block=128):
    """FlexAttention's BlockMask of a causal layer over S tokens: which blocks of `block` x `block`
    scores to visit, and in which of those every score is visible. Computed from the blocks'
    corners, so nothing S x S exists; torch's create_block_mask would evaluate S x S positions.

    documents (B, S) or None, numbered in any way. A pair of blocks is skipped if their ranges of
    numbers do not overlap, and fully visible if both lie in one document."""
    blocks = math.ceil(S / block)
    q = torch.arange(blocks, device=device)[:, None]
    k = torch.arange(blocks, device=device)[None]
    nearest = (q - k) * block - (block - 1)  # smallest and largest distance within a pair of blocks
    farthest = (q - k) * block + (block - 1)
    visited, full = farthest >= 0, (nearest >= 0) & ((q + 1) * block <= S)
    if window is not None:
        visited, full = visited & (nearest < window), full & (farthest < window)
    visible = causal if window is None else sliding(window)
    if documents is not None:
        numbers = F.pad(documents, (0, blocks * block - S), mode="replicate")
        numbers = numbers.unflatten(1, (blocks, block))
        low, high = numbers.amin(-1), numbers.amax(-1)  # (B, blocks)
        visited = visited & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
        uniform = low == high
        full = full & uniform[:, :, None] & uniform[:, None] & (low[:, :, None] == low[:, None])
        begins = document_begins(documents)
        if begins is None:
            visible = within_documents(visible, documents)
        else:
            token = torch.arange(S)
            lowest = torch.where(begins, token, 0).cummax(1).values
            if window is not None:
                lowest = lowest.maximum(token - window + 1)
            visible = from_lowest(lowest.int().to(device))

    def listed(pairs):  # per row of blocks: the count of set blocks, and indices with the set first
        B = pairs.shape[0] if pairs.dim() == 3 else 1
        pairs = pairs.expand(B, blocks, blocks)[:, None].int()  # (B, 1, q, k)
        indices = pairs.argsort(dim=-1, descending=True, stable=True).int()
        return pairs.sum(-1, dtype=torch.int32), indices

    lists = *listed(visited & ~full), *listed(visited & full)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(S, S))


# --------------------------------------------------------------------------------------------------
# cuDNN's kernel, with sinks


@fused
def fold_sinks(out, lse, sinks):
    """As model.apply_sinks, with the logsumexp that includes the sink as a second result."""
    with_sink = torch.logaddexp(lse, sinks.float()[:, None])  # (B, H, S)
    return (out.float() * (lse - with_sink).exp()[..., None]).to(out.dtype), with_sink


@fused
def sink_gradient(grad, out, lse, sinks):
    """dsinks (H). The sink's weight is exp(sink - lse) and its value is zero, so the gradient of
    its score is -weight * (grad . out)."""
    delta = (grad.float() * out.float()).sum(-1)  # (B, H, S)
    return -((sinks.float()[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)


def head_groups(size, K, most):
    """The number of groups of the K key-value heads in which a backward of attention runs, so that
    each group needs at most `most` bytes where all heads at once need `size`; K if none do."""
    divisors = (n for n in range(1, K + 1) if K % n == 0)
    return next((n for n in divisors if size <= n * most), K)


# Working memory of the backward besides its results, in bytes per element of q. On cuDNN it holds
# dq in fp32 and, for each query head, dk and dv in bf16: 4 GiB at 128K tokens of the 20b.
ON_CUDNN = 8
# With packed documents it also copies the inputs and results of some of them: at most 16 bytes in
# all were measured.
OF_DOCUMENTS = 16


def in_head_groups(run, size, grad, q, k, v, out, lse):
    """run(grad, q, k, v, out, lse) -> (dq, dk, dv), of tensors with heads in dim 1: all at once, or
    in groups of heads if its `size` bytes of working memory exceed ATTENTION_BYTES."""
    inputs = grad, q, k, v, out, lse
    groups = head_groups(size, k.shape[1], fast.ATTENTION_BYTES)
    if groups == 1:
        return run(*inputs)
    say(f"attention's backward: {groups} groups of heads, one after the other, to save memory")
    results = [torch.empty_like(x) for x in (q, k, v)]
    for dq, dk, dv, *group in zip(*(x.chunk(groups, dim=1) for x in (*results, *inputs))):
        for whole, part in zip((dq, dk, dv), run(*group)):
            whole.copy_(part)
    return results


class CudnnSinkAttention(torch.autograd.Function):
    """Sink attention built on cuDNN's causal kernel, which does not support sinks. Shapes as in
    model.dense_attention, S = T.

    cuDNN's backward computes p = exp(score - lse) and the gradient of the score,
    p (grad . v - grad . out). Both formulas hold with a sink if lse and out are those that include
    it: dq, dk and dv come out exact with the kernel untouched, and sink_gradient gives dsinks. At
    32K tokens on an H200 it runs at 491 TFLOP/s forward and 426 backward, FlexAttention at 401 and
    309 (`python -m bench`). With FlexAttention instead, 8K is 7 % slower, 32K 10 % (of what, see
    fast.py)."""

    @staticmethod
    def forward(ctx, q, k, v, sinks):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # the kernel wants (B, heads, S, D)

        def attend():
            out, lse, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(
                q, k, v, None, True, is_causal=True
            )
            out, with_sink = fold_sinks(out, lse.view(out.shape[:3]), sinks)
            return out, with_sink.view(lse.shape), *rest

        # run attend() once; on recomputation reuse its stored result
        out, lse, ctx.cum_q, ctx.cum_k, ctx.max_q, ctx.max_k, seed, offset, _ = once(attend)
        ctx.save_for_backward(q, k, v, sinks, out, lse, seed, offset)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "cuDNN's attention has no second derivative: "
                "run forward and backward inside `with fast.plain():`"
            )
        q, k, v, sinks, out, lse, seed, offset = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        rest = seed, offset, None, ctx.cum_q, ctx.cum_k, ctx.max_q, ctx.max_k, 0.0, True

        def run(grad, q, k, v, out, lse):
            op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
            return op(grad, q, k, v, out, lse.contiguous(), *rest)

        dq, dk, dv = in_head_groups(run, ON_CUDNN * q.numel(), grad, q, k, v, out, lse)
        needs_sinks = ctx.needs_input_grad[3]
        dsinks = sink_gradient(grad, out, lse.view(out.shape[:3]), sinks) if needs_sinks else None
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dsinks


cudnn_sink_attention = CudnnSinkAttention.apply
SWITCHES.add("cudnn_sink_attention")


def cudnn_refuses(device, dtype, head_dim):
    """Why cuDNN's attention cannot be used here, or None."""
    if not is_on("cudnn_sink_attention"):
        return "it is switched off"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    return _cudnn_fails(device, dtype, head_dim)


def error_of(attention, device, dtype, head_dim):
    """The error of a small trial run of attention(q, k, v, sinks), or None: the only sure test of
    GPU, driver and version."""
    try:
        options = {"device": device, "dtype": dtype, "requires_grad": True}
        q, k, v = (torch.randn(1, 128, heads, head_dim, **options) for heads in (2, 1, 1))
        with torch.enable_grad():
            attention(q, k, v, torch.zeros(2, **options)).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError) as error:
        return f"it fails here: {str(error).splitlines()[0]}"


@functools.cache
def _cudnn_fails(device, dtype, head_dim):
    return error_of(CudnnSinkAttention.apply, device, dtype, head_dim)


# --------------------------------------------------------------------------------------------------
# Packed documents

LONG = 3072  # tokens from which a document runs on cuDNN; 1K to 8K differ little, docs/LOG.md
# FlashAttention's backward works on 128 more tokens per document, and takes at most MOST documents.
# If there are more, or more than one per SHORTEST of all N tokens, all run on FlexAttention.
SHORTEST, MOST = 32, 65_535
# cuDNN makes a plan for each length it meets, so documents are padded: from each power of two to
# the next there are SIZES lengths.
SIZES = 8

# One call of a kernel: a slice or the indices of its n tokens among all N; its forward and its
# backward; and the last arguments of both.
Call = namedtuple("Call", "tokens forward backward sizes")


def padded(length):
    """`length` rounded up to the next length that documents are padded to, see SIZES."""
    step = max(1 << length.bit_length() - 1, SIZES) // SIZES
    return -(-length // step) * step


def plan_documents(documents):
    """documents (B, S) -> the Calls of its attention; None if FlexAttention must do it."""
    begins = document_begins(documents)
    if begins is None:
        say("packed documents: FlexAttention after all, because a number comes again later")
        return None
    starts = begins.flatten().nonzero()[:, 0]
    lengths = torch.diff(starts, append=torch.tensor([begins.numel()]))
    is_long = lengths >= LONG
    calls = [
        Call(slice(start, start + length), on_cudnn, on_cudnn_backward, (padded(length),))
        for start, length in zip(starts[is_long].tolist(), lengths[is_long].tolist())
    ]
    short = lengths[~is_long]
    if len(short) > MOST or SHORTEST * len(short) > begins.numel():
        say("packed documents: FlexAttention after all, because they are many and very short")
        return None
    if len(short):
        tokens = slice(None)
        if calls:
            tokens = (~is_long).repeat_interleave(lengths).nonzero()[:, 0].to(documents.device)
        ends = F.pad(short.cumsum(0), (1, 0)).int().to(documents.device)
        calls.append(Call(tokens, on_flash, on_flash_backward, (ends, short.max().item())))
    return calls


def one_sequence(x, size):
    """x (n, heads, D) -> (1, heads, size, D): a document, padded with zeros, as cuDNN wants it."""
    missing, x = size - len(x), x[None].transpose(1, 2)  # strides as in CudnnSinkAttention
    return F.pad(x, (0, 0, 0, missing)) if missing else x  # F.pad copies even to add nothing


def on_cudnn(q, k, v, size):
    """Attention without sinks in one document, padded to `size` tokens: q (n, H, D), k and v
    (n, K, D) -> out (n, H, D), lse (n, H) fp32, and two tensors for the backward."""
    n = len(q)
    out, lse, *_, seed, offset, _ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(one_sequence(x, size) for x in (q, k, v)), None, True, is_causal=True
    )
    return out[0, :, :n].transpose(0, 1), lse.view(-1, size)[:, :n].t(), seed, offset


def on_cudnn_backward(grad, q, k, v, out, lse, seed, offset, size):
    """(dq, dk, dv), which are those with sinks if out and lse include them. Padding changes none of
    them: a padded query has a gradient of zero, and no other query sees a padded key."""
    n = len(q)
    inputs = (one_sequence(x, size) for x in (grad, q, k, v, out))
    lse = F.pad(lse.t(), (0, size - n)).contiguous()[None, ..., None]  # (1, H, size, 1)
    rest = seed, offset, None, None, None, size, size, 0.0, True
    op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    return [dx[0, :, :n].transpose(0, 1) for dx in op(*inputs, lse, *rest)]


def on_flash(q, k, v, ends, longest):
    """As on_cudnn, for many documents: ends (number of documents + 1), int32, is 0 and where each
    ends; `longest` is the most tokens that one has."""
    out, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, 0.0, True, False
    )
    return out, lse.t(), state, unused


def on_flash_backward(grad, q, k, v, out, lse, state, unused, ends, longest):
    rest = ends, ends, longest, longest, 0.0, True, state, unused
    lse = lse.t().contiguous()  # (H, n)
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *rest)


def backward_bytes(calls, q):
    """Working memory in bytes of the backward of these Calls, for q (N, H, D). FlashAttention's has
    dq, in fp32, of 128 more tokens per document: for short ones that exceeds all the rest."""
    documents = sum(len(call.sizes[0]) - 1 for call in calls if call.backward is on_flash_backward)
    return OF_DOCUMENTS * q.numel() + 4 * 128 * documents * q[0].numel()


def put(wholes, parts, tokens, N):
    """Write each of `parts` (n, ...) into its whole (N, ...) at `tokens`, and return the wholes.
    wholes: None at first. Parts of all N tokens are the wholes themselves."""
    if len(parts[0]) == N:
        return parts
    wholes = wholes or [x.new_empty(N, *x.shape[1:]) for x in parts]
    for whole, part in zip(wholes, parts):
        whole[tokens] = part
    return wholes


class DocumentAttention(torch.autograd.Function):
    """Sink attention within documents: q (B, S, H, D), k and v (B, S, K, D), sinks (H), the Calls
    of plan_documents -> (B, S, H, D). Sinks are added as in CudnnSinkAttention. RuntimeError for a
    second derivative."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, calls):
        shape = q.shape
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (N, heads, D)

        def attend():
            wholes, states = None, []  # states: two tensors of each call, for its backward
            for call in calls:
                inputs = (x[call.tokens] for x in (q, k, v))
                out, lse, *state = call.forward(*inputs, *call.sizes)
                wholes, states = put(wholes, (out, lse), call.tokens, len(q)), states + state
            out, lse = wholes
            out, lse = fold_sinks(out.transpose(0, 1)[None], lse.t()[None], sinks)
            return out[0].transpose(0, 1), lse[0].t(), *states  # (N, H, D), (N, H)

        out, lse, *states = once(attend)
        ctx.calls = calls
        ctx.save_for_backward(q, k, v, sinks, out, lse, *states)
        return out.view(shape)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the attention of packed documents has no second derivative: "
                "run forward and backward inside `with fast.plain():`"
            )
        q, k, v, sinks, out, lse, *states = ctx.saved_tensors
        B, grad = len(grad), grad.flatten(0, 1)

        def run(*inputs):  # grad, q, k, v, out and lse, of all heads or of a group
            grads = None
            for number, call in enumerate(ctx.calls):
                state = states[2 * number : 2 * number + 2]
                parts = call.backward(*(x[call.tokens] for x in inputs), *state, *call.sizes)
                grads = put(grads, parts, call.tokens, len(q))
            return grads

        grads = in_head_groups(run, backward_bytes(ctx.calls, q), grad, q, k, v, out, lse)
        dsinks = None
        if ctx.needs_input_grad[3]:
            grad, out = (x.transpose(0, 1)[None] for x in (grad, out))
            dsinks = sink_gradient(grad, out, lse.t()[None], sinks)
        return *(x.unflatten(0, (B, -1)) for x in grads), dsinks, None


SWITCHES.add("document_attention")


def document_attention(q, k, v, sinks, plan):
    return DocumentAttention.apply(q, k, v, sinks, plan)


def documents_refused(device, dtype, head_dim):
    """Why documents cannot run on these kernels here, or None."""
    if not is_on("document_attention"):
        return "it is switched off"
    return cudnn_refuses(device, dtype, head_dim) or _flash_fails(device, dtype, head_dim)


@functools.cache
def _flash_fails(device, dtype, head_dim):
    plan = plan_documents(torch.arange(128, device=device)[None] // 64)
    attention = functools.partial(document_attention, plan=plan)
    return error_of(attention, device, dtype, head_dim)
