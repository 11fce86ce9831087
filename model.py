"""GPT-OSS in one file: a mixture-of-experts transformer with sliding windows and learned attention sinks.

The mathematics in reading order: configuration, norm, rotary positions, sink attention, experts, loss, model.
One GPU and eight read the same: sequence parallelism lives in sp.py and is the identity where there is no group.

References: the definition, https://github.com/openai/gpt-oss (gpt_oss/torch/model.py); the model card,
https://arxiv.org/abs/2508.10925. Where we differ: experts' matrices are (in, out), with the gate and up halves side by side, not
interleaved (convert_hf.py reorders them); and rotary tables, sinks, the router's logits and the experts' activation, weighting
and sum are computed in fp32.

What is written for speed says what it gains: how much longer forward and backward of 8K or 32K tokens take the usual way, with six
of the 20b's layers on an H200 (`python tests/ablation.py`; docs/LOG.md, 2026-11-25). With all 24 layers the gains in the loss are
about a third as large.

Letters in shapes:
    B sequences    S tokens of each: this rank's, but inside attention the whole sequence's (s and S where both occur)
    N = B S rows of tokens    V vocabulary    C hidden size
    H query heads  K key-value heads    D head dim    E experts    k experts a token uses    F expert hidden size
    R = N k rows of tokens, one for each expert a token uses, sorted by expert
"""

import functools
import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.utils.checkpoint import checkpoint

import sp
from checkpoint import copy_rows, first_rank, hugging_face_fields, load_weights, save_weights, stored_dtype

IGNORED = -100  # a target that the loss does not count
LOSS_ROWS = 2048  # rows of logits that exist at a time: 0.8 GiB of bf16 for the real vocabulary; with 1024, 8K takes 4 % longer
EXPERT_TOKENS = 32 * 1024  # tokens that pass the experts at a time, in 7 GiB at the real size; with 8192, 32K takes 10 % longer

# ----------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPTOSSConfig:
    """Sizes of the model, under OpenAI's names. The defaults are gpt-oss-20b's."""

    num_hidden_layers: int = 24
    num_experts: int = 32
    experts_per_token: int = 4
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880  # of each expert
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int = 128  # keys a query of an even layer sees, its own included; odd layers see everything
    swiglu_limit: float = 7.0
    initial_context_length: int = 4096  # the context before YaRN stretched it
    rope_theta: float = 150000.0
    rope_scaling_factor: float = 32.0
    rope_ntk_alpha: float = 1.0  # YaRN's beta_slow: dimensions that turn less often than this are interpolated
    rope_ntk_beta: float = 32.0  # YaRN's beta_fast: dimensions that turn more often than this are left alone
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        for field in fields(GPTOSSConfig):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
            if not number or (field.type is int and value != int(value)):
                raise ValueError(f"{field.name}={value!r} must be a positive {field.type.__name__}")
            setattr(self, field.name, field.type(value))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.rope_theta <= 1:
            raise ValueError(f"rope_theta={self.rope_theta} must be greater than 1: it is the base of the rotary frequencies")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}")

    @classmethod
    def gpt_oss_20b(cls):
        return cls()

    @classmethod
    def gpt_oss_120b(cls):
        return cls(num_hidden_layers=36, num_experts=128)

    @classmethod
    def from_json(cls, path):
        """Read our config.json, OpenAI's original one or Hugging Face's. ValueError for a model this file does not implement."""
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a readable config.json ({error})") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(given).__name__}")
        names = {field.name for field in fields(cls)}
        if "model_type" in given:
            given = hugging_face_fields(given, names, path)
        missing = names - given.keys() - {"max_position_embeddings", "rms_norm_eps"}  # OpenAI's original leaves these two out
        unknown = given.keys() - names
        if missing or unknown:
            raise ValueError(f"{path}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path):
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def window(self, layer):
        """Keys that a query of this layer sees, itself included; None: all before it."""
        return self.sliding_window if layer % 2 == 0 else None

    def keys(self, layer, seq_len):
        """Keys that the average query of this layer sees in a sequence of `seq_len`."""
        w = min(self.window(layer) or seq_len, seq_len)
        return w - w * (w - 1) / 2 / seq_len  # the first w queries see 1 … w keys, the others w

    def block_matrices(self):
        """{name: weights} of the matrices that a token meets in a block."""
        C, heads, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        experts = self.experts_per_token * C * self.intermediate_size
        return {
            "qkv": C * (heads + 2 * kv),
            "out": heads * C,
            "router": C * self.num_experts,
            "gate_up": 2 * experts,
            "down": experts,
        }

    def flops_per_token(self, seq_len):
        """FLOPs that training spends on one token of a sequence of `seq_len`: forward and backward, nothing recomputed,
        active experts only, and only the keys that attention may see (Chowdhery et al., https://arxiv.org/abs/2204.02311)."""
        matrices = self.num_hidden_layers * sum(self.block_matrices().values()) + self.hidden_size * self.vocab_size
        keys = sum(self.keys(layer, seq_len) for layer in range(self.num_hidden_layers))
        heads = self.num_attention_heads * self.head_dim
        return 6 * matrices + 3 * 4 * heads * keys  # a matrix: 2 forward, 4 backward; a key: scores and values


# ----------------------------------------------------------------------------------------------------------------------
# Helpers: what is said, what is compiled. Nothing here changes the mathematics


@functools.cache
def say(message):
    """Print a choice once, on the first rank."""
    if first_rank():
        print(message, flush=True)


# One compiled function serves all lengths, but needs a variant for each kind of mask, dtype, one row or several, with gradients or
# without: FlexAttention more than the 8 that PyTorch allows. The setting is the whole process's.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def fused(function):
    """Compile `function` for a GPU, where it becomes one kernel or two instead of one an operation; a CPU runs it as written.

    Only leaves are compiled, never a block: what talks to other ranks stays in the order it is written in. fullgraph makes it
    an error where the compiler would give up and FlexAttention would fall back to S x S scores in silence. Not compiled, 8K
    takes 92 % longer, 32K 71 %, with 18 GiB more.

    comprehensive_padding is off because with it PyTorch 2.11 writes the sum that lse's gradient is made of in one layout and reads
    it in another, padded one: dsinks, dq and dk are wrong if S, or with several rows H S, is over 1024 and no multiple of 32.
    2.13 did not, where we looked (docs/LOG.md, 2026-11-25)."""
    compiled = torch.compile(function, fullgraph=True, options={"comprehensive_padding": False})

    @functools.wraps(function)
    def call(x, *args, **kwargs):
        return (compiled if x.is_cuda else function)(x, *args, **kwargs)

    return call


def add_matmul_(total, a, b):
    """total += a @ b, with `total` in fp32 and a, b in whatever they are in."""
    if total.is_cuda and a.dtype != total.dtype:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.addmm_(a.to(total.dtype), b.to(total.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Norm and rotary positions


@fused
def rms_norm(x, weight, eps):
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)  # multiplied in fp32, before the cast


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467, in fp32 inside."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_tables(config, positions):
    """cos and sin (S, D/2), fp32, of the angles by which YaRN (https://arxiv.org/abs/2309.00071) turns each dimension pair, times
    YaRN's temperature of attention: it scales q and k both, and so scores by its square."""
    D, context = config.head_dim, config.initial_context_length
    pair = torch.arange(D // 2, dtype=torch.float32, device=positions.device)
    extrapolated = 1 / config.rope_theta ** (2 * pair / D)  # as trained: fast pairs keep their frequency
    interpolated = extrapolated / config.rope_scaling_factor  # slow pairs are stretched to the longer context

    def pair_that_turns(times):  # `times` times within the initial context; not rounded to a whole pair
        return D / 2 * math.log(context / (times * 2 * math.pi)) / math.log(config.rope_theta)

    low, high = max(pair_that_turns(config.rope_ntk_beta), 0), min(pair_that_turns(config.rope_ntk_alpha), D - 1)
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    angles = positions[:, None].float() * (interpolated * ramp + extrapolated * (1 - ramp))  # (S, D/2)
    concentration = 0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling_factor > 1 else 1.0
    return angles.cos() * concentration, angles.sin() * concentration


def rotate(x, cos, sin):
    """x (B, S, heads, D): turn the pairs (x[i], x[i + D/2]). In fp32, then back to x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (S, 1, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@fused
def split_and_rotate(qkv, cos, sin, num_key_value_heads):
    """(B, S, (H + 2K) D), rows q, k, v -> q (B, S, H, D), k and v (B, S, K, D), q and k turned to their positions."""
    D, K = 2 * cos.shape[-1], num_key_value_heads
    heads = qkv.unflatten(-1, (-1, D))
    q, k, v = heads.split((heads.shape[2] - 2 * K, K, K), dim=2)
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


# ----------------------------------------------------------------------------------------------------------------------
# Attention with sinks. Each head has a learned logit, the sink, that takes part in the softmax and has no value: a head that
# finds nothing to attend to can attend to it, and add nothing. Query head h reads key-value head h // (H/K).


def dense_attention(q, k, v, sinks, window=None, documents=None):
    """The definition, on any device and in any dtype: scores, mask, a column for the sink, softmax, column dropped.

    q (B, S, H, D), k and v (B, T, K, D), sinks (H), documents (B, T) -> (B, S, H, D). The queries are the last S of the T
    positions. Memory grows with H S T: the twin that the fast kernels are tested against, and the path for a CPU."""
    B, S, H, D = q.shape
    T, K = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.unflatten(2, (K, H // K))  # (B, S, K, H/K, D)
    scores = torch.einsum("bskhd,btkd->bkhst", q, k).to(wide) / math.sqrt(D)
    distance = torch.arange(T - S, T, device=q.device)[:, None] - torch.arange(T, device=q.device)  # (S, T)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if documents is not None:
        visible = visible & (documents[:, T - S :, None] == documents[:, None, :])  # (B, S, T)
        visible = visible[:, None, None]  # (B, 1, 1, S, T)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = sinks.to(wide).view(1, K, H // K, 1, 1).expand(B, -1, -1, S, 1)
    weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1].to(v.dtype)  # (B, K, H/K, S, T)
    return torch.einsum("bkhst,btkd->bskhd", weights, v).flatten(2, 3)  # (B, S, H, D)


def apply_sinks(out, lse, sinks):
    """The same sinks after the fact: out (B, H, S, D) of attention without sinks and lse (B, H, S), the logsumexp of its
    scores, become attention with sinks. Softmax gives the keys the share exp(lse) / (exp(lse) + exp(sink)) of the whole.

    In fp32. The gradient must flow through lse too, or it is wrong in q and k."""
    share = torch.sigmoid(lse.float() - sinks.float()[:, None])  # (B, H, S)
    return (out.float() * share[..., None]).to(out.dtype)


def causal(b, h, q, k):
    return q >= k


@functools.cache
def sliding(window):
    return lambda b, h, q, k: (q >= k) & (q - k < window)


def within_documents(visible, documents):
    return lambda b, h, q, k: visible(b, h, q, k) & (documents[b, q] == documents[b, k])


def block_mask(S, window, documents, device, block=128):
    """The BlockMask of a causal layer over S tokens: which blocks of `block` x `block` scores to visit, and which of those
    to visit without looking at single scores. Found from the blocks' corners, so nothing S x S ever exists.

    documents: (B, S) or None. They may be numbered in any way: a pair of blocks is skipped if their ranges of numbers do not
    meet, a pair of blocks in one and the same document is visited whole, and in every other the scores are looked at."""
    blocks = math.ceil(S / block)
    q, k = torch.arange(blocks, device=device)[:, None], torch.arange(blocks, device=device)[None]
    nearest, farthest = (q - k) * block - (block - 1), (q - k) * block + (block - 1)  # distances in a pair of blocks
    visited, whole = farthest >= 0, (nearest >= 0) & ((q + 1) * block <= S)
    if window is not None:
        visited, whole = visited & (nearest < window), whole & (farthest < window)
    visible = causal if window is None else sliding(window)
    if documents is not None:
        padded = F.pad(documents, (0, blocks * block - S), mode="replicate").unflatten(1, (blocks, block))
        low, high = padded.amin(-1), padded.amax(-1)  # (B, blocks)
        visited = visited & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
        whole = whole & (low == high)[:, :, None] & (low == high)[:, None] & (low[:, :, None] == low[:, None])
        visible = within_documents(visible, documents)

    def listed(pairs):  # for each row of blocks, how many it has and their numbers, those first
        pairs = pairs.expand(pairs.shape[0] if pairs.dim() == 3 else 1, blocks, blocks)[:, None].int()  # (B, 1, q, k)
        return pairs.sum(-1, dtype=torch.int32), pairs.argsort(dim=-1, descending=True, stable=True).int()

    partial, whole = listed(visited & ~whole), listed(visited & whole)
    return BlockMask.from_kv_blocks(*partial, *whole, BLOCK_SIZE=block, mask_mod=visible, seq_lengths=(S, S))


@fused
def flex_sink_attention(q, k, v, sinks, mask):
    """FlexAttention, which makes a fused kernel of any mask. Shapes as in dense_attention, S = T."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (B, heads, S, D)
    options = {"BACKEND": "TRITON"}  # or for less than 128 queries PyTorch takes its decoding kernel, which fails with our masks
    out, aux = flex_attention(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True), kernel_options=options)
    return apply_sinks(out, aux.lse, sinks).transpose(1, 2)


@fused
def fold_sinks(out, lse, sinks):
    """As apply_sinks, with the logsumexp that includes the sink."""
    with_sink = torch.logaddexp(lse, sinks.float()[:, None])  # (B, H, S)
    return (out.float() * (lse - with_sink).exp()[..., None]).to(out.dtype), with_sink


@fused
def sink_gradient(grad, out, lse, sinks):
    """dsinks (H): a sink's weight is exp(sink - lse) and its value zero, so its score's gradient is -weight * (grad . out)."""
    delta = (grad.float() * out.float()).sum(-1)  # (B, H, S)
    return -((sinks.float()[:, None] - lse).exp() * delta).sum((0, 2)).to(sinks.dtype)


class CudnnSinkAttention(torch.autograd.Function):
    """cuDNN's causal attention, which knows no sinks, with sinks. Shapes as in dense_attention, S = T.

    cuDNN's backward computes p = exp(score - lse) and the score's gradient p (grad . v - grad . out). With a sink both formulas
    hold as they stand, if lse and out are those that include it: dq, dk and dv come out exact with the kernel untouched, and
    the sink's own gradient is sink_gradient's. On an H200 at 32K tokens it runs at 491 TFLOP/s forward and 426 backward, where
    FlexAttention reaches 401 and 309 (bench.py). With FlexAttention instead, 8K takes 7 % longer, 32K 10 %."""

    @staticmethod
    def forward(ctx, q, k, v, sinks):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (B, heads, S, D)

        def attend():
            out, lse, *rest = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=True)
            out, with_sink = fold_sinks(out, lse.view(out.shape[:3]), sinks)
            return out, with_sink.view(lse.shape), *rest

        # what attend() returns; when a recomputed block runs again, what it returned then: see Recompute, below
        out, lse, ctx.cum_q, ctx.cum_k, ctx.max_q, ctx.max_k, seed, offset, _ = once(attend)
        ctx.save_for_backward(q, k, v, sinks, out, lse, seed, offset)
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks, out, lse, seed, offset = ctx.saved_tensors
        grad = grad.transpose(1, 2)
        dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, k, v, out, lse, seed, offset, None, ctx.cum_q, ctx.cum_k, ctx.max_q, ctx.max_k, 0.0, True
        )
        dsinks = sink_gradient(grad, out, lse.view(out.shape[:3]), sinks)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dsinks


def cudnn_refuses(device, dtype, head_dim):
    """Why cuDNN's attention cannot be used here, or None."""
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {dtype}"
    return _cudnn_fails(device, dtype, head_dim)


@functools.cache
def _cudnn_fails(device, dtype, head_dim):
    try:  # a small run is the only sure test of device, driver, version and head dim
        q, k, v = (torch.randn(1, 128, 1, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in "qkv")
        with torch.enable_grad():
            CudnnSinkAttention.apply(q, k, v, torch.zeros(1, device=device, dtype=dtype)).sum().backward()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError) as error:
        return f"it fails here: {str(error).splitlines()[0]}"


def choose_attention(S, window, documents, device, dtype, head_dim):
    """The attention(q, k, v, sinks) of all layers with this window, over whole sequences of S tokens; says which and why.

    documents: (B, S) or None. Called once a forward and kind of layer, because a block mask is worth making only once."""
    layers = "full layers" if window is None else f"window {window} layers"
    if device.type != "cuda" or head_dim < 16:
        say(f"attention of {layers}: dense, as the fused kernels want a GPU and heads of at least 16 dimensions")
        return functools.partial(dense_attention, window=window, documents=documents)
    if window is None and documents is None:
        refusal = cudnn_refuses(device, dtype, head_dim)
        if refusal is None:
            say(f"attention of {layers}: cuDNN, fastest where the mask is plainly causal")
            return CudnnSinkAttention.apply
        say(f"attention of {layers}: FlexAttention, not cuDNN, because {refusal}")
    else:
        say(f"attention of {layers}{' in packed documents' if documents is not None else ''}: FlexAttention")
    return functools.partial(flex_sink_attention, mask=block_mask(S, window, documents, device))


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_heads = kv_heads
        self.qkv = nn.Linear(config.hidden_size, (heads + 2 * kv_heads) * D)
        self.out = nn.Linear(heads * D, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(heads))

    def forward(self, x, cos, sin, attend, remember=None):  # x (B, S, C)
        q, k, v = split_and_rotate(self.qkv(x), cos, sin, self.num_key_value_heads)  # (B, S, heads, D)
        if remember is not None:  # generation: add k and v to those of earlier calls
            k, v = remember(k, v)  # (B, T, K, D)
        out = sp.ulysses(attend)(q, k, v, self.sinks)  # (B, S, H, D)
        return self.out(out.flatten(2))  # (B, S, H D) -> (B, S, C)


# ----------------------------------------------------------------------------------------------------------------------
# Experts


@fused
def swiglu(h, bias, expert, limit):
    """(R, 2F), gates then ups, of rows that belong to `expert` (R) -> (R, F). GPT-OSS's SwiGLU: gate sigmoid(1.702 gate), which is
    nearly GELU, times up + 1; gates are clamped from above, ups on both sides."""
    gate, up = (h.float() + bias.float()[expert]).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(h.dtype)


@fused
def swiglu_backward_(h, bias, expert, limit, da, weight, dgate, dup):
    """With a = swiglu(h) and the gradient `weight * da` of a: fill dgate and dup (R, F), the halves of h's gradient, and return
    weight * a (R, F) and da . a (R). Halves, because the compiler makes one kernel of this, and two of one with a torch.cat."""
    gate, up = (h.float() + bias.float()[expert]).chunk(2, dim=-1)
    gate_open, up_open = gate <= limit, up.abs() <= limit  # a clamped value has no gradient
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    sigmoid = torch.sigmoid(1.702 * gate)
    da, weight = da.float(), weight[:, None]
    a = (up + 1) * gate * sigmoid
    dgate.copy_(weight * da * (up + 1) * sigmoid * (1 + 1.702 * gate * (1 - sigmoid)) * gate_open)
    dup.copy_(weight * da * gate * sigmoid * up_open)
    return (weight * a).to(h.dtype), (da * a).sum(-1)


@fused
def combine(y, where, weights, bias, experts):
    """Rows y (R, C) -> (N, C): each token's k rows, found by `where` (N, k), plus their experts' bias, weighted, summed."""
    picked = y[where].float() + bias.float()[experts]  # (N, k, C), inside the kernel only
    return (picked * weights[..., None]).sum(1).to(y.dtype)  # the bias is weighted too


@fused
def gather_sum(rows, where):
    """(R, C), where (N, k) -> (N, C): the sum of each token's k rows. Not a scatter, whose atomic adds are slow and unordered."""
    return rows[where].float().sum(1).to(rows.dtype)


def sort_by_expert(experts, num_experts):
    """experts (N, k), the choices of N tokens -> the R = N k choices sorted by expert: their numbers in experts.flatten(),
    their experts, the end of each expert's share (E); and for each choice its place among the sorted, (N, k)."""
    expert, order = experts.flatten().short().sort(stable=True)  # 16 bits are enough, and a GPU sorts 8 of them a pass
    expert = expert.long()
    ends = torch.searchsorted(expert, torch.arange(num_experts, device=expert.device), right=True, out_int32=True)
    where = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return order, expert, ends, where.view_as(experts)


def tiles(*tensors):
    return zip(*(x.split(EXPERT_TOKENS) for x in tensors))


class ExpertsFunction(torch.autograd.Function):
    """x (N, C), experts (N, k), weights (N, k) fp32 -> (N, C): each token's experts, weighted and summed. No token is dropped.
    w1, b1 are the experts' gate_up parameters, w2, b2 their down ones.

    The backward is written out because it can do what autograd cannot. It goes through the tokens in tiles, so its working
    memory does not grow with the sequence. In a checkpointed block it makes from x what it needs, and the second run computes
    nothing. And the routing weights' gradient g . y needs no expert's output y = a W2 + b2, because
    g . y = (g W2^T) . a + g . b2. By autograd 8K takes 21 % longer, 32K 14 %, with 15 GiB more; with a second run
    like the first they take 11 % and 8 % longer."""

    @staticmethod
    def forward(ctx, x, experts, weights, w1, b1, w2, b2, limit, keep_hidden):
        ctx.limit, k = limit, experts.shape[1]
        hidden, out = [], torch.empty_like(x)
        if not (Recompute.current and Recompute.current.replaying):  # the experts end a block: a second run's is not read
            for tile, choice, weight, result in tiles(x, experts, weights, out):
                order, expert, ends, where = sort_by_expert(choice, len(w1))
                h = F.grouped_mm(tile[order // k], w1, offs=ends)  # (R, C) x (E, C, 2F) -> (R, 2F)
                y = F.grouped_mm(swiglu(h, b1, expert, limit), w2, offs=ends)  # (R, F) x (E, F, C) -> (R, C)
                result.copy_(combine(y, where, weight, b2, choice))
                if keep_hidden:
                    hidden.append(h)
        ctx.save_for_backward(x, experts, weights, w1, b1, w2, b2, *hidden)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, experts, weights, w1, b1, w2, b2, *hidden = ctx.saved_tensors
        k, dx, dweights, totals = experts.shape[1], torch.empty_like(x), torch.empty_like(weights), None
        for tile, choice, weight, g, dtile, dweight in tiles(x, experts, weights, grad, dx, dweights):
            order, expert, ends, where = sort_by_expert(choice, len(w1))
            rows, g_rows = tile[order // k], g[order // k]  # (R, C)
            h = hidden.pop(0) if hidden else F.grouped_mm(rows, w1, offs=ends)  # (R, 2F)
            da = F.grouped_mm(g_rows, w2.transpose(1, 2), offs=ends)  # (R, F)
            dh = torch.empty_like(h)
            halves = dh.chunk(2, dim=-1)
            weighted_a, da_a = swiglu_backward_(h, b1, expert, ctx.limit, da, weight.flatten()[order], *halves)
            dtile.copy_(gather_sum(F.grouped_mm(dh, w1.transpose(1, 2), offs=ends), where))
            dweight.copy_(da_a[where] + (g @ b2.t()).gather(1, choice))
            of_expert = F.one_hot(expert, len(w1)).to(dh.dtype)  # (R, E): bias gradients as matmuls, not atomic adds
            routing = g.new_zeros(len(g), len(w1)).scatter_(1, choice, weight.to(g.dtype))  # (N, E), the weights
            parts = (
                F.grouped_mm(rows.t(), dh, offs=ends),  # (C, R) x (R, 2F) -> (E, C, 2F)
                of_expert.t() @ dh,  # (E, 2F)
                F.grouped_mm(weighted_a.t(), g_rows, offs=ends),  # (F, R) x (R, C) -> (E, F, C)
                routing.t() @ g,  # (E, C)
            )
            totals = parts if totals is None else [t.float().add_(p) for t, p in zip(totals, parts)]  # in fp32 if tiled
        dw1, db1, dw2, db2 = (total.to(w1.dtype) for total in totals)
        return dx, None, dweights, dw1, db1, dw2, db2, None, None


class RouterLogits(torch.autograd.Function):
    """x (N, C), weight (E, C), bias (E) -> (N, E) in fp32: rounded to bf16 they would tie, and tokens go to other experts.

    No fp32 copy of x is made, which autograd would keep: a ninth of what a block keeps when nothing is recomputed. With it
    32K takes 2 GiB more, and no time that could be told from noise."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return add_matmul_(bias.float().repeat(len(x), 1), x, weight.t())

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g = grad.to(x.dtype)
        return g @ weight, g.t() @ x, grad.sum(0).to(weight.dtype)


class Experts(nn.Module):
    """A router that picks k of E small MLPs for each token and weights them."""

    def __init__(self, config):
        super().__init__()
        E, C, intermediate = config.num_experts, config.hidden_size, config.intermediate_size
        self.experts_per_token, self.limit = config.experts_per_token, config.swiglu_limit
        self.router = nn.Linear(C, E)
        self.gate_up_weight = nn.Parameter(torch.empty(E, C, 2 * intermediate))  # (experts, in, out), gates then ups
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * intermediate))
        self.down_weight = nn.Parameter(torch.empty(E, intermediate, C))
        self.down_bias = nn.Parameter(torch.empty(E, C))
        self.load = 0  # (E) tokens each expert was given in training since someone last set this to 0

    def forward(self, x):  # (B, S, C)
        rows = x.flatten(0, 1)  # (N, C)
        logits = RouterLogits.apply(rows, self.router.weight, self.router.bias)  # (N, E)
        top, experts = logits.topk(self.experts_per_token, dim=-1)  # (N, k)
        if torch.is_grad_enabled() and not (Recompute.current and Recompute.current.replaying):
            self.load = self.load + F.one_hot(experts, logits.shape[1]).sum((0, 1))
        parameters = self.gate_up_weight, self.gate_up_bias, self.down_weight, self.down_bias
        keep_hidden = torch.is_grad_enabled() and not Recompute.current
        return ExpertsFunction.apply(rows, experts, top.softmax(-1), *parameters, self.limit, keep_hidden).view_as(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config)

    def forward(self, x, cos, sin, attend, remember=None):  # x (B, S, C)
        x = x + self.attention(self.attention_norm(x), cos, sin, attend, remember)
        return x + self.mlp(self.mlp_norm(x))


# ----------------------------------------------------------------------------------------------------------------------
# Loss. The logits of 64K tokens would take 25 GiB, so they exist a few rows at a time.


@fused
def pick_logprobs(logits, targets):
    """(N, V), (N) -> log softmax at the target (N) fp32, 0 where it is not counted, and the logsumexp (N) fp32."""
    lse = logits.float().logsumexp(-1)
    picked = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0].float() - lse
    return torch.where(targets == IGNORED, 0, picked), lse


@fused
def logits_gradient_(logits, targets, lse, scale):
    """Overwrite logits (N, V) by the gradient of sum(scale * logprobs): scale (N) times onehot - softmax."""
    onehot = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    scale = torch.where(targets == IGNORED, 0, scale)[:, None]
    logits.copy_((onehot.float() - (logits.float() - lse[:, None]).exp()) * scale)


def loss_gradient(x, weight, targets, scale):
    """logprobs (N) of x (N, C) under the unembedding `weight` (V, C), and the gradients of sum(scale * logprobs) in x, weight."""
    logprobs, dx = torch.empty_like(scale), torch.empty_like(x)
    dweight = torch.zeros_like(weight, dtype=torch.float32)  # every few rows add to it: in fp32
    for rows, target, s, logp, drows in zip(*(t.split(LOSS_ROWS) for t in (x, targets, scale, logprobs, dx))):
        logits = rows @ weight.t()  # (LOSS_ROWS, V)
        picked, lse = pick_logprobs(logits, target)
        logp.copy_(picked)
        logits_gradient_(logits, target, lse, s)
        torch.mm(logits, weight, out=drows)
        add_matmul_(dweight, logits.t(), rows)
    return logprobs, dx, dweight.to(weight.dtype)


class LogProbs(torch.autograd.Function):
    """x (N, C), weight (V, C), targets (N) -> (N) fp32, 0 where not counted. The backward makes the logits again."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        ctx.save_for_backward(x, weight, targets)
        return torch.cat([pick_logprobs(r @ weight.t(), t)[0] for r, t in zip(x.split(LOSS_ROWS), targets.split(LOSS_ROWS))])

    @staticmethod
    def backward(ctx, grad):
        _, dx, dweight = loss_gradient(*ctx.saved_tensors, grad.contiguous())
        return dx, dweight, None


class CrossEntropy(torch.autograd.Function):
    """-sum(LogProbs) / count, for training. What will be done with the logprobs is known, so the gradient is made while the
    logits exist: three matmuls instead of four. With four, 8K takes 11 % longer, 32K 7 %."""

    @staticmethod
    def forward(ctx, x, weight, targets, count):
        logprobs, dx, dweight = loss_gradient(x, weight, targets, (-1 / count).expand(len(x)).contiguous())
        ctx.save_for_backward(dx, dweight)
        return -logprobs.sum() / count

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():  # create_graph: dx and dweight would pass for constants
            raise RuntimeError("the loss has no second derivative: its backward is written out, for one pass")
        dx, dweight = ctx.saved_tensors
        return dx * grad, dweight * grad, None, None


# ----------------------------------------------------------------------------------------------------------------------
# Recomputation: a checkpointed block computes once more what its backward needs, and this spares it the rest


class Recompute:
    """What a checkpointed block may skip when it runs a second time to give its backward the activations.

    A checkpointed block keeps its input and nothing else. The second run needs every value that a backward reads, but not
    the block's output (`replaying`), and it need not redo a costly step whose result was put aside (`once`). For one backward:
    a second one through the same graph fails."""

    current = None  # of the checkpointed block that runs now; None outside of one

    def __init__(self, keep_attention):
        self.keep_attention, self.kept, self.replaying = keep_attention, [], False

    @contextmanager
    def run(self, replaying):
        Recompute.current, self.replaying = self, replaying
        try:
            yield
        finally:
            Recompute.current = None

    @classmethod
    def contexts(cls, keep_attention):
        """The pair of contexts that torch.utils.checkpoint asks for: one for each run."""
        state = cls(keep_attention)
        return state.run(False), state.run(True)


def once(compute):
    """compute(), a tuple of tensors; in a block's second run what it returned in the first, if attention is to be kept."""
    state = Recompute.current
    if state is None or not state.keep_attention:
        return compute()
    if not state.replaying:
        state.kept.append(compute())
        return state.kept[-1]
    return state.kept.pop(0)


# ----------------------------------------------------------------------------------------------------------------------
# The model


class GPTOSS(nn.Module):
    """GPT-OSS. `recompute` says what of a block's activations is computed again in the backward instead of being kept: "none",
    "all", or all but what cuDNN's "attention" returned on full layers, whose cost grows with the square of S; where another
    kernel runs, as with packed documents, that is "all". The last `keep_blocks` blocks recompute nothing: the last, because
    the backward frees them first, in a step's first micro-batch before most gradients exist."""

    def __init__(self, config, recompute="none", keep_blocks=0):
        super().__init__()
        if recompute not in ("none", "attention", "all"):
            raise ValueError(f"recompute={recompute!r}: choose none, attention or all")
        self.config, self.recompute, self.keep_blocks = config, recompute, keep_blocks
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, tokens, targets=None, documents=None, count=None):
        """tokens (B, S) int64 -> logits (B, S, V); or with targets (B, S), the tokens that follow, the loss, fp32.

        The loss is the mean over the targets that are not -100. Those are `count`, a 0-d tensor, if that is given: for a
        batch that is a part of a larger one. documents (B, S): attention stays between equal numbers. In a sequence-
        parallel group all of them are this rank's slice, and the ranks' losses add up to the loss."""
        if targets is None:
            return self.unembedding(self.features(tokens, documents))
        self._check(targets, "targets", tokens.shape, IGNORED)
        x = self.features(tokens, documents)
        if count is None:
            count = sp.all_reduce((targets != IGNORED).sum())
        count = count.clamp(min=1).float()  # no counted target: the loss is 0, and so is its gradient
        inputs = x.flatten(0, 1), self.unembedding.weight, targets.flatten()
        return CrossEntropy.apply(*inputs, count) if torch.is_grad_enabled() else -LogProbs.apply(*inputs).sum() / count

    def logprobs(self, tokens, targets, documents=None):
        """log p(targets[b, i] | tokens[b, : i + 1]) (B, S), fp32, differentiable; 0 where the target is -100."""
        self._check(targets, "targets", tokens.shape, IGNORED)
        x = self.features(tokens, documents)
        return LogProbs.apply(x.flatten(0, 1), self.unembedding.weight, targets.flatten()).view(targets.shape)

    def features(self, tokens, documents=None, cache=None):
        """tokens (B, S) -> (B, S, C), what the unembedding makes logits of. cache: see sample.py's KeyValueCache."""
        self._check(tokens, "tokens", tokens.shape)
        config, s = self.config, tokens.shape[1]
        S, start = s * sp.size(), cache.length if cache else 0
        if cache and (documents is not None or sp.size() > 1):
            raise ValueError("a cache is for one document on one rank: give no documents, and no sequence-parallel group")
        if start + S > config.max_position_embeddings:
            raise ValueError(f"{start + S} tokens do not fit the model's max_position_embeddings={config.max_position_embeddings}")
        if documents is not None:
            if documents.shape != tokens.shape or documents.is_floating_point():
                raise ValueError(
                    f"documents must be integers of shape {tuple(tokens.shape)}; got {documents.dtype} {tuple(documents.shape)}"
                )
            documents = sp.gather_sequence(documents)
        x = self.embedding(tokens)  # (B, S, C)
        cos, sin = rope_tables(config, start + sp.positions(s, tokens.device))
        attend = {
            window: functools.partial(dense_attention, window=window)
            if cache
            else choose_attention(S, window, documents, x.device, x.dtype, config.head_dim)
            for window in (config.sliding_window, None)
        }
        for layer, block in enumerate(self.blocks):
            remember = functools.partial(cache.extend, layer) if cache else None
            inputs = x, cos, sin, attend[config.window(layer)], remember
            kept = self.recompute == "none" or layer >= config.num_hidden_layers - self.keep_blocks
            if kept or not torch.is_grad_enabled():
                x = block(*inputs)
            else:
                contexts = functools.partial(Recompute.contexts, keep_attention=self.recompute == "attention")
                x = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return self.norm(x)

    def _check(self, ids, name, shape, other=0):
        """ValueError unless `ids` are (B, S) integers in the vocabulary, or `other`."""
        if ids.dim() != 2 or ids.shape != shape or ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"{name} must be integers of one shape (B, S), not empty; got {ids.dtype} {tuple(ids.shape)}, {tuple(shape)}"
            )
        V, wrong = self.config.vocab_size, ids[((ids < 0) | (ids >= self.config.vocab_size)) & (ids != other)]
        if len(wrong):
            raise ValueError(f"{name} must lie in [0, vocab_size={V}){f' or be {other}' if other else ''}; found {wrong[0].item()}")

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Set every parameter, also after construction on the meta device and to_empty, and the same on any number of ranks.

        Matrices normal with GPT-2's 0.02, those that write into the residual stream smaller by sqrt(2 layers), norms one,
        biases and sinks zero."""
        for number, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("bias", "sinks")):
                nn.init.zeros_(parameter)
            else:
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if name.endswith(("out.weight", "down_weight")) else 0.02
                generator = torch.Generator(parameter.device).manual_seed(seed * 100003 + number)
                copy_rows(parameter, torch.empty(parameter.shape, device=parameter.device).normal_(0, std, generator=generator))

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype=None, recompute="none"):
        """The model in `folder`, as save_checkpoint or convert_hf.py wrote it, with checkpoint.load_weights's
        errors. dtype None: that of the first stored tensor, for all."""
        with torch.device("meta"):
            model = cls(GPTOSSConfig.from_json(Path(folder) / "config.json"), recompute)
        model = model.to(dtype or stored_dtype(folder)).to_empty(device=device)
        load_weights(model, folder)
        return model

    def save_checkpoint(self, folder, dtype=None):
        """Write config.json and the parameters, as `dtype` if given, with checkpoint.save_weights's layout and errors."""
        save_weights(self, folder, dtype, write_config=self.config.to_json)
