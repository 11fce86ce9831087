"""The fast twins of model.py's definitions: each computes what its definition says, and runs in its
place.

Nothing here is needed to understand the model. `@faster(twin)` above a definition swaps the twin
in; `with fast.plain():` swaps all of them out again (switch.py). tests/test_fast.py compares each
with its definition, outputs and gradients.

Each optimisation states its gain as the slowdown without it, for forward + backward at 8K and 32K
tokens of six of the 20b's layers on an H200 (`python -m bench --ablation`; docs/LOG.md,
2026-11-25). With all 24 layers the gains in the loss are about a third as large.

Letters in shapes are model.py's, and R = N k: a row per token and chosen expert, sorted by expert.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from recompute import Recompute, once, replaying
from switch import (  # noqa: F401 (for others: they say fast.plain)
    PAIRS,
    SWITCHES,
    as_now,
    declined,
    differentiable_gradients,
    faster,
    fused,
    is_on,
    plain,
    say,
)

IGNORED = -100  # a target that the loss does not count, as in model.py
LOSS_TOKENS = 2048  # tokens whose logits exist at a time: 0.8 GiB in bf16 for the real vocabulary;
# with 1024, 8K is 4 % slower
EXPERT_TOKENS = 32 * 1024  # tokens per tile of the experts: 7 GiB of working memory for the 20b;
# with 8192, 32K is 10 % slower
ATTENTION_BYTES = 8 * 2**30  # of working memory for attention's backward: 256K tokens of 64 heads
FEW_TOKENS = 2  # up to which generation reads each token's experts by itself


def is_small(gib):
    """Whether a GPU with `gib` GiB trades some speed for memory."""
    return gib < 40


def tile_sizes(gib):
    """(EXPERT_TOKENS, ATTENTION_BYTES) for a GPU with `gib` GiB. On a small one the tiles of the
    20b's experts work in 0.9 GiB."""
    return (4096, 2 * 2**30) if is_small(gib) else (32 * 1024, 8 * 2**30)


def fit_tiles(gib):
    """Set the sizes of tiles for a GPU with `gib` GiB."""
    global EXPERT_TOKENS, ATTENTION_BYTES
    EXPERT_TOKENS, ATTENTION_BYTES = tile_sizes(gib)
    if is_small(gib):
        say(f"{gib:.1f} GiB: tiles of {EXPERT_TOKENS} tokens in the experts")


def add_matmul_(total, a, b):
    """total += a @ b, accumulated in total's fp32 whatever the dtype of a and b."""
    if total.is_cuda and a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


# --------------------------------------------------------------------------------------------------
# Attention: which kernel, FlexAttention's block mask, and cuDNN's kernel with sinks


def choose_kernel(window, documents, device, dtype, head_dim):
    """The attention kernel of the layers with this window: "cuDNN", "FlexAttention" or "dense".
    Prints which, and why."""
    layers = f"window {window} layers" if window else "full layers"
    packed = " with packed documents" if documents is not None else ""
    if not is_on("flex_sink_attention"):
        kernel, why = "dense", "the fast kernels are switched off"
    elif device.type != "cuda" or head_dim < 16:
        kernel, why = "dense", "fused kernels need a GPU and head_dim of at least 16"
    elif dtype == torch.float64:
        kernel, why = "dense", "fused kernels have no fp64"
    elif window is not None or documents is not None:
        kernel, why = "FlexAttention", "the mask is more than causal"
    elif refusal := cudnn_refuses(device, dtype, head_dim):
        kernel, why = "FlexAttention", f"cuDNN is not usable: {refusal}"
    else:
        kernel, why = "cuDNN", "fastest for a plain causal mask"
    say(f"attention of {layers}{packed}: {kernel} ({why})")
    return kernel


def causal(b, h, q, k):
    return q >= k


@functools.cache  # one function per window
def sliding(window):
    return lambda b, h, q, k: (q >= k) & (q - k < window)


def within_documents(visible, documents):
    return lambda b, h, q, k: visible(b, h, q, k) & (documents[b, q] == documents[b, k])


def block_mask(S, window, documents, device, block=128):
    """FlexAttention's BlockMask of a causal layer over S tokens: which blocks of `block` x `block`
    scores to visit, and in which of those every score is visible. Found from the blocks' corners,
    so nothing S x S ever exists; torch's create_block_mask would evaluate all S x S positions.

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
        padded = F.pad(documents, (0, blocks * block - S), mode="replicate")
        padded = padded.unflatten(1, (blocks, block))
        low, high = padded.amin(-1), padded.amax(-1)  # (B, blocks)
        visited = visited & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
        uniform = low == high
        full = full & uniform[:, :, None] & uniform[:, None] & (low[:, :, None] == low[:, None])
        visible = within_documents(visible, documents)

    def listed(pairs):  # per row of blocks: the count of set blocks, and indices with the set first
        B = pairs.shape[0] if pairs.dim() == 3 else 1
        pairs = pairs.expand(B, blocks, blocks)[:, None].int()  # (B, 1, q, k)
        indices = pairs.argsort(dim=-1, descending=True, stable=True).int()
        return pairs.sum(-1, dtype=torch.int32), indices

    lists = *listed(visited & ~full), *listed(visited & full)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(S, S))


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
    """In how many groups of the K key-value heads the backward of cuDNN's attention runs, for
    `size` numbers in q, so that each needs `most` bytes.

    Beside its results it needs the gradient of q in fp32, and in bf16 those of k and v for each
    query head: 8 bytes for each number in q, 4 GiB at 128K tokens of the 20b."""
    divisors = (n for n in range(1, K + 1) if K % n == 0)
    return next((n for n in divisors if 8 * size <= n * most), K)


def cudnn_backward(*inputs):
    """(dq, dk, dv) of cuDNN's attention, in groups of heads if all together need too much."""
    run = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
    heads, rest = inputs[:6], inputs[6:]  # grad, q, k, v, out, lse
    groups = head_groups(heads[1].numel(), heads[2].shape[1], ATTENTION_BYTES)
    if groups == 1:
        return run(*inputs)
    say(f"attention's backward: {groups} groups of heads, one after the other, to save memory")
    results = [torch.empty_like(x) for x in heads[1:4]]
    split = zip(*(x.chunk(groups, dim=1) for x in (*results, *heads)))
    for dq, dk, dv, *group, lse in split:
        for whole, part in zip((dq, dk, dv), run(*group, lse.contiguous(), *rest)):
            whole.copy_(part)
    return results


class CudnnSinkAttention(torch.autograd.Function):
    """Sink attention built on cuDNN's causal kernel, which does not support sinks. Shapes as in
    model.dense_attention, S = T.

    cuDNN's backward computes p = exp(score - lse) and the gradient of the score,
    p (grad . v - grad . out). Both formulas hold with a sink if lse and out are those that include
    it: dq, dk and dv come out exact with the kernel untouched, and sink_gradient gives dsinks. At
    32K tokens on an H200 it runs at 491 TFLOP/s forward and 426 backward, FlexAttention at 401 and
    309 (`python -m bench`). With FlexAttention instead, 8K is 7 % slower, 32K 10 %."""

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
        dq, dk, dv = cudnn_backward(grad, q, k, v, out, lse, *rest)
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


@functools.cache
def _cudnn_fails(device, dtype, head_dim):
    """The error of a small trial run, or None: the only sure test of GPU, driver and version."""
    try:
        options = {"device": device, "dtype": dtype, "requires_grad": True}
        q, k, v = (torch.randn(1, 128, heads, head_dim, **options) for heads in (2, 1, 1))
        with torch.enable_grad():
            sinks = torch.zeros(2, **options)
            CudnnSinkAttention.apply(q, k, v, sinks).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError) as error:
        return f"it fails here: {str(error).splitlines()[0]}"


# --------------------------------------------------------------------------------------------------
# Router


class RouterLogits(torch.autograd.Function):
    """Twin of model.router_logits that makes no fp32 copy of x for autograd to keep: a ninth of
    what a block keeps when nothing is recomputed. The gradient is rounded to x's dtype once. With
    that copy 32K takes 2 GiB more, and no time that could be told from noise."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return add_matmul_(bias.float().repeat(len(x), 1), x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g = grad.to(x.dtype)
        dx = g @ weight if ctx.needs_input_grad[0] else None
        dweight = g.t() @ x if ctx.needs_input_grad[1] else None
        dbias = grad.sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def router_logits(x, weight, bias):
    return RouterLogits.apply(x, weight, bias)


# --------------------------------------------------------------------------------------------------
# Experts


@fused
def biased_swiglu(h, bias, expert, limit):
    """model.swiglu of h (R, 2F) plus the bias of each row's expert (R) -> (R, F)."""
    gate, up = (h.float() + bias.float()[expert]).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(h.dtype)


@fused
def biased_swiglu_backward_(h, bias, expert, limit, da, weight, dgate, dup):
    """For a = biased_swiglu(h) with gradient `weight * da`: fill dgate and dup (R, F), the halves
    of h's gradient, and return weight * a (R, F) and da . a (R). The compiler makes one kernel of
    two halves, and two kernels of a torch.cat."""
    gate, up = (h.float() + bias.float()[expert]).chunk(2, dim=-1)
    gate_open, up_open = gate <= limit, up.abs() <= limit  # a clamped value has no gradient
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(1.702 * gate)
    da, weight = da.float(), weight[:, None]
    a = (up + 1) * gate * sigmoid
    slope = sigmoid * (1 + 1.702 * gate * (1 - sigmoid))  # of gate * sigmoid(1.702 gate)
    dgate.copy_(weight * da * (up + 1) * slope * gate_open)
    dup.copy_(weight * da * gate * sigmoid * up_open)
    return (weight * a).to(h.dtype), (da * a).sum(-1)


@fused
def combine(y, where, routing, bias, chosen):
    """Rows y (R, C) -> (N, C): each token's k rows, found by `where` (N, k), plus their experts'
    bias, weighted by `routing` (N, k) and summed."""
    picked = y[where].float() + bias.float()[chosen]  # (N, k, C), inside the kernel only
    return (picked * routing[..., None]).sum(1).to(y.dtype)


@fused
def gather_sum(rows, where):
    """(R, C), where (N, k) -> (N, C): the sum of each token's k rows. A scatter would need atomic
    adds, which are slow and unordered."""
    return rows[where].float().sum(1).to(rows.dtype)


def sort_by_expert(chosen, num_experts):
    """Sort the R = N k choices (N, k) by expert. Returns order (R), the choice each row comes from;
    expert (R), each row's expert; ends (E), where each expert's rows end; and where (N, k), each
    choice's row."""
    # int16: a radix sort takes 8 bits per pass
    expert, order = chosen.flatten().short().sort(stable=True)
    expert = expert.long()
    numbers = torch.arange(num_experts, device=expert.device)
    ends = torch.searchsorted(expert, numbers, right=True, out_int32=True)
    rows = torch.arange(len(order), device=order.device)
    where = torch.empty_like(order).scatter_(0, order, rows)
    return order, expert, ends, where.view_as(chosen)


def tiles(*tensors):
    return zip(*(x.split(EXPERT_TOKENS) for x in tensors))


GROUPED = 9, 10  # compute capabilities with kernels: Hopper, and Blackwell of data centres


def capability(device):
    """(major, minor) of a CUDA device, None for another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def grouped_mm(a, b, offs):
    """F.grouped_mm. Where PyTorch has no kernel for it, it runs a matmul per expert: said once."""
    version = capability(a.device)
    if version and version[0] not in GROUPED:
        say(
            "experts: a matmul for each, slower, because PyTorch's grouped matmuls have kernels "
            f"for compute capability 9 and 10, and this GPU has {version[0]}.{version[1]}"
        )
    return F.grouped_mm(a, b, offs=offs)


class ExpertsFunction(torch.autograd.Function):
    """Twin of model.experts: tokens sorted by expert, one grouped matmul per matrix.

    The backward is written out because it can do what autograd cannot. It goes through the tokens
    in tiles, so its working memory does not grow with the sequence. In a recomputed block it
    starts from x, so the replayed forward skips the experts. The routing weights' gradient g . y
    needs no expert's output y = a W2 + b2, as g . y = (g W2^T) . a + g . b2. Nothing is computed
    for weights that need no gradient. With autograd 8K is 21 % slower, 32K 14 %, with 15 GiB more;
    with a full replay they are 11 % and 8 % slower."""

    @staticmethod
    def forward(ctx, x, chosen, routing, w1, b1, w2, b2, limit, keep_hidden):
        ctx.limit, k = limit, chosen.shape[1]
        hidden, out = [], torch.empty_like(x)
        if replaying():  # experts come last in a block: their output is not read, or it shows
            out.fill_(math.nan)
        else:
            for tile, choice, share, result in tiles(x, chosen, routing, out):
                order, expert, ends, where = sort_by_expert(choice, len(w1))
                h = grouped_mm(tile[order // k], w1, offs=ends)  # (R, C) x (E, C, 2F) -> (R, 2F)
                a = biased_swiglu(h, b1, expert, limit)  # (R, F)
                y = grouped_mm(a, w2, offs=ends)  # (R, F) x (E, F, C) -> (R, C)
                result.copy_(combine(y, where, share, b2, choice))
                if keep_hidden:
                    hidden.append(h)
        ctx.save_for_backward(x, chosen, routing, w1, b1, w2, b2, *hidden)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, chosen, routing, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            inputs = x, chosen, routing, w1, b1, w2, b2, ctx.limit
            return *differentiable_gradients("experts", inputs, grad), None
        needs_x, _, needs_routing, needs_w1, needs_b1, needs_w2, needs_b2, *_ = ctx.needs_input_grad
        k = chosen.shape[1]
        dx = torch.empty_like(x) if needs_x else None
        drouting = torch.empty_like(routing) if needs_routing else None
        totals = {}  # the gradients of the weights, in fp32 if there are several tiles

        def add(name, part):
            totals[name] = totals[name].float().add_(part) if name in totals else part

        for number, (tile, choice, share, g) in enumerate(tiles(x, chosen, routing, grad)):
            tokens = slice(number * EXPERT_TOKENS, number * EXPERT_TOKENS + len(tile))
            order, expert, ends, where = sort_by_expert(choice, len(w1))
            rows, g_rows = tile[order // k], g[order // k]  # (R, C)
            h = hidden.pop(0) if hidden else grouped_mm(rows, w1, offs=ends)  # (R, 2F)
            da = grouped_mm(g_rows, w2.transpose(1, 2), offs=ends)  # (R, F)
            dh = torch.empty_like(h)
            weighted_a, da_a = biased_swiglu_backward_(
                h, b1, expert, ctx.limit, da, share.flatten()[order], *dh.chunk(2, dim=-1)
            )
            if needs_x:
                dx[tokens] = gather_sum(grouped_mm(dh, w1.transpose(1, 2), offs=ends), where)
            if needs_routing:
                drouting[tokens] = da_a[where] + (g @ b2.t()).gather(1, choice)
            if needs_w1:
                add("w1", grouped_mm(rows.t(), dh, offs=ends))  # (C, R) x (R, 2F) -> (E, C, 2F)
            if needs_b1:  # bias gradients as matmuls: indexing has a backward of atomic adds
                add("b1", F.one_hot(expert, len(w1)).to(dh.dtype).t() @ dh)  # (E, R) x (R, 2F)
            if needs_w2:
                add("w2", grouped_mm(weighted_a.t(), g_rows, offs=ends))  # -> (E, F, C)
            if needs_b2:
                spread = g.new_zeros(len(g), len(w1)).scatter_(1, choice, share.to(g.dtype))
                add("b2", spread.t() @ g)  # (E, N) x (N, C)
        names = "w1", "b1", "w2", "b2"
        grads = (totals[name].to(w1.dtype) if name in totals else None for name in names)
        return dx, None, drouting, *grads, None, None


@fused
def expert_products(x, w, expert):
    """Row r of x (R, C) times w[expert[r]], of w (E, C, F) -> (R, F). The compiler reads the
    matrices in place: the gather and the sum are one kernel."""
    return (x.float()[:, :, None] * w[expert].float()).sum(1).to(x.dtype)


def few_experts(x, chosen, routing, w1, b1, w2, b2, limit):
    """model.experts for a few tokens on a GPU, without gradients: bound by reading the weights, and
    tokens rarely share experts. Nothing is sorted, and no group is mostly padding."""
    expert = chosen.flatten()  # (R)
    where = torch.arange(len(expert), device=x.device).view_as(chosen)
    h = expert_products(x.repeat_interleave(chosen.shape[1], dim=0), w1, expert)  # (R, 2F)
    y = expert_products(biased_swiglu(h, b1, expert, limit), w2, expert)  # (R, C)
    return combine(y, where, routing, b2, chosen)


def experts(x, chosen, routing, w1, b1, w2, b2, limit):
    few = len(x) <= FEW_TOKENS and x.is_cuda and not torch.is_grad_enabled()
    if few and is_on("expert_products"):
        return few_experts(x, chosen, routing, w1, b1, w2, b2, limit)
    if not all(size * x.element_size() % 16 == 0 for size in w2.shape[1:]):  # F and C
        return declined(
            "experts",
            f"grouped matmuls need rows of a multiple of 16 bytes, and hidden_size={w2.shape[2]}, "
            f"intermediate_size={w2.shape[1]} in {x.dtype} have others",
        )
    keep_hidden = torch.is_grad_enabled() and not Recompute.current
    return ExpertsFunction.apply(x, chosen, routing, w1, b1, w2, b2, limit, keep_hidden)


# --------------------------------------------------------------------------------------------------
# Loss. The logits of 64K tokens would take 25 GiB, so they exist for LOSS_TOKENS tokens at a time.


@fused
def pick_logprobs(logits, targets, temperature):
    """logits (N, V), targets (N), temperature 0-d -> of logits / temperature: log p(target) (N), 0
    where ignored, and the logsumexp (N), fp32."""
    lse = (logits.float() / temperature).logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float() / temperature - lse
    return torch.where(targets == IGNORED, 0, picked), lse


@fused
def entropy_of(logits, lse, temperature):
    """The entropy (N) of softmax(logits / temperature), whose logsumexp is lse (N)."""
    logp = logits.float() / temperature - lse[:, None]
    return -(logp.exp() * logp).sum(-1)


@fused
def logits_gradient_(logits, targets, lse, scale, temperature):
    """Overwrite logits (N, V) with the gradient of sum(scale * logprobs), scale (N):
    scale * (onehot - softmax) / temperature."""
    onehot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    scale = torch.where(targets == IGNORED, 0, scale / temperature)[:, None]
    p = (logits.float() / temperature - lse[:, None]).exp()
    logits.copy_((onehot.float() - p) * scale)


@fused
def logits_gradient_with_entropy_(logits, targets, lse, scale, temperature, entropy, dentropy):
    """As logits_gradient_, plus the gradient of sum(dentropy * entropy): H = -sum(p log p) has the
    derivative -p (log p + H) / temperature."""
    onehot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    scale = torch.where(targets == IGNORED, 0, scale)[:, None]
    logp = logits.float() / temperature - lse[:, None]
    p, change = logp.exp(), logp + entropy[:, None]
    logits.copy_(((onehot.float() - p) * scale - p * change * dentropy[:, None]) / temperature)


def chunks(*tensors):
    return zip(*(t.split(LOSS_TOKENS) for t in tensors))


def loss_gradient(x, weight, targets, scale, temperature, needs_weight, dentropy=None):
    """logprobs (N) of x (N, C) under the unembedding `weight` (V, C), and the gradients of
    sum(scale * logprobs), plus sum(dentropy * entropy) if given, in x and weight; None for the
    latter unless needs_weight."""
    logprobs, dx = torch.empty_like(scale), torch.empty_like(x)
    dweight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
    dentropies = dentropy.split(LOSS_TOKENS) if dentropy is not None else None
    for number, (h, target, s, logp, dh) in enumerate(chunks(x, targets, scale, logprobs, dx)):
        logits = h @ weight.t()  # (LOSS_TOKENS, V)
        picked, lse = pick_logprobs(logits, target, temperature)
        logp.copy_(picked)
        if dentropies is None:
            logits_gradient_(logits, target, lse, s, temperature)
        else:
            entropy = entropy_of(logits, lse, temperature)
            more = entropy, dentropies[number]
            logits_gradient_with_entropy_(logits, target, lse, s, temperature, *more)
        torch.mm(logits, weight, out=dh)
        if needs_weight:
            add_matmul_(dweight, logits.t(), h)  # summed over the chunks in fp32
    return logprobs, dx, dweight.to(weight.dtype) if needs_weight else None


class LogProbs(torch.autograd.Function):
    """Twin of model.logprobs_and_entropy, or without the entropy, of model.logprobs. The backward
    recomputes the logits."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, with_entropy):
        ctx.set_materialize_grads(False)  # None for an output that the loss does not use
        ctx.number = temperature
        ctx.temperature = torch.full((), temperature, device=x.device)  # a number would recompile
        ctx.save_for_backward(x, weight, targets)
        logprobs, entropies = [], []
        for h, target in chunks(x, targets):
            logits = h @ weight.t()  # (LOSS_TOKENS, V)
            picked, lse = pick_logprobs(logits, target, ctx.temperature)
            logprobs.append(picked)
            if with_entropy:
                entropies.append(entropy_of(logits, lse, ctx.temperature))
        return torch.cat(logprobs), torch.cat(entropies) if with_entropy else None

    @staticmethod
    def backward(ctx, grad, dentropy):
        x, weight, targets = ctx.saved_tensors
        grad = torch.zeros(len(x), device=x.device) if grad is None else grad.contiguous()
        if torch.is_grad_enabled():  # create_graph=True
            inputs = x, weight, targets, ctx.number
            if dentropy is None:
                return *differentiable_gradients("logprobs", inputs, grad), None
            grads = grad, dentropy
            return *differentiable_gradients("logprobs_and_entropy", inputs, grads), None
        needs_weight = ctx.needs_input_grad[1]
        dentropy = None if dentropy is None else dentropy.contiguous()
        _, dx, dweight = loss_gradient(
            x, weight, targets, grad, ctx.temperature, needs_weight, dentropy
        )
        return dx, dweight, None, None, None


class MeanLoss(torch.autograd.Function):
    """Twin of model.mean_loss, for training. The gradient is computed in the forward, while the
    logits exist: three matmuls instead of four. With four, 8K is 11 % slower, 32K 7 %."""

    @staticmethod
    def forward(ctx, x, weight, targets, weights, count):
        scale = (-1 / count).expand(len(x)) if weights is None else -weights / count
        one, needs_weight = torch.ones((), device=x.device), ctx.needs_input_grad[1]
        scale = scale.contiguous()
        logprobs, dx, dweight = loss_gradient(x, weight, targets, scale, one, needs_weight)
        ctx.save_for_backward(x, weight, targets, weights, count, dx, dweight, logprobs)
        return (scale * logprobs).sum()

    @staticmethod
    def backward(ctx, grad):
        x, weight, targets, weights, count, dx, dweight, logprobs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: dx and dweight would pass for constants
            inputs = x, weight, targets, weights, count
            return differentiable_gradients("mean_loss", inputs, grad)
        dweights = -logprobs / count * grad if ctx.needs_input_grad[3] else None
        return dx * grad, None if dweight is None else dweight * grad, None, dweights, None


def logprobs(x, unembedding, targets, temperature):
    return LogProbs.apply(x, unembedding, targets, temperature, False)[0]


def logprobs_and_entropy(x, unembedding, targets, temperature):
    return LogProbs.apply(x, unembedding, targets, temperature, True)


def mean_loss(x, unembedding, targets, weights, count):
    if x.dtype == torch.float16:
        return declined("mean_loss", "fp16 gradients computed before a loss scale would underflow")
    if torch.is_grad_enabled() and (x.requires_grad or unembedding.requires_grad):
        return MeanLoss.apply(x, unembedding, targets, weights, count)
    return NotImplemented  # without a gradient the definition, on the twin of logprobs, is as fast


# --------------------------------------------------------------------------------------------------
# Recomputation, see recompute.py


def recomputed(block, *inputs, keep_attention):
    """block(*inputs), keeping only the inputs; the backward recomputes the activations, but for
    cuDNN's attention output if keep_attention."""
    contexts = functools.partial(Recompute.contexts, keep_attention, as_now())
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )
