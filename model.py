"""GPT-OSS in one file: a mixture-of-experts transformer with sliding windows and learned attention sinks.

Every step is defined here, in reading order: configuration, norm, rotary positions, attention, experts, loss, model. Where a line
says `@faster(...)`, fast.py has a function that computes the same and runs in its place; `with fast.plain():` switches them
off, and this file alone is the model. One GPU and eight read the same: sequence parallelism lives in sp.py and does nothing when
there is no group.

References: the original, https://github.com/openai/gpt-oss (gpt_oss/torch/model.py); the model card,
https://arxiv.org/abs/2508.10925. Differences from the original: expert matrices are (in, out), with all gate columns before all up
columns instead of interleaved (convert_hf.py reorders them); rotary tables, sinks, router logits and the experts' activation and
weighted sum are computed in fp32.

Letters in shapes:
    B sequences    S tokens of each: this rank's slice, but the whole sequence inside attention
    N = B S tokens    V vocabulary    C hidden size
    H query heads  K key-value heads  D head dim    E experts    k experts a token uses    F expert hidden size
"""

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

import fast
import sp
from fast import faster, fused
from weights import copy_rows, load_weights, read_config, save_weights, stored_dtype

IGNORED = -100  # a target that the loss does not count

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
    sliding_window: int = (
        128  # keys a query of an even layer sees, its own included; odd layers see everything
    )
    swiglu_limit: float = 7.0
    initial_context_length: int = 4096  # the context before YaRN stretched it
    rope_theta: float = 150000.0
    rope_scaling_factor: float = 32.0
    rope_ntk_alpha: float = (
        1.0  # YaRN's beta_slow: dimensions that turn less often than this are interpolated
    )
    rope_ntk_beta: float = (
        32.0  # YaRN's beta_fast: dimensions that turn more often than this are left alone
    )
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        for field in fields(GPTOSSConfig):
            value = getattr(self, field.name)
            number = (
                isinstance(value, (int, float))
                and not isinstance(value, bool)
                and 0 < value < math.inf
            )
            if not number or (field.type is int and value != int(value)):
                raise ValueError(f"{field.name}={value!r} must be a positive {field.type.__name__}")
            setattr(self, field.name, field.type(value))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta={self.rope_theta} must be greater than 1: it is the base of the rotary frequencies"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be at most num_experts={self.num_experts}"
            )

    @classmethod
    def gpt_oss_20b(cls):
        return cls()

    @classmethod
    def gpt_oss_120b(cls):
        return cls(num_hidden_layers=36, num_experts=128)

    @classmethod
    def from_json(cls, path):
        """Read a config.json of ours, OpenAI's or Hugging Face's, with weights.read_config's errors."""
        return read_config(path, cls)

    def to_json(self, path):
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def window(self, layer):
        """Keys that a query of this layer sees, itself included; None: all before it."""
        return self.sliding_window if layer % 2 == 0 else None


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
    extrapolated = 1 / config.rope_theta ** (
        2 * pair / D
    )  # as trained: fast pairs keep their frequency
    interpolated = (
        extrapolated / config.rope_scaling_factor
    )  # slow pairs are stretched to the longer context

    def pair_that_turns(
        times,
    ):  # `times` times within the initial context; not rounded to a whole pair
        return D / 2 * math.log(context / (times * 2 * math.pi)) / math.log(config.rope_theta)

    low, high = (
        max(pair_that_turns(config.rope_ntk_beta), 0),
        min(pair_that_turns(config.rope_ntk_alpha), D - 1),
    )
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    angles = positions[:, None].float() * (
        interpolated * ramp + extrapolated * (1 - ramp)
    )  # (S, D/2)
    concentration = (
        0.1 * math.log(config.rope_scaling_factor) + 1 if config.rope_scaling_factor > 1 else 1.0
    )
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
    distance = torch.arange(T - S, T, device=q.device)[:, None] - torch.arange(
        T, device=q.device
    )  # (S, T)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if documents is not None:
        visible = visible & (documents[:, T - S :, None] == documents[:, None, :])  # (B, S, T)
        visible = visible[:, None, None]  # (B, 1, 1, S, T)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = sinks.to(wide).view(1, K, H // K, 1, 1).expand(B, -1, -1, S, 1)
    weights = (
        torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1].to(v.dtype)
    )  # (B, K, H/K, S, T)
    return torch.einsum("bkhst,btkd->bskhd", weights, v).flatten(2, 3)  # (B, S, H, D)


def apply_sinks(out, lse, sinks):
    """The same sinks after the fact: out (B, H, S, D) of attention without sinks and lse (B, H, S), the logsumexp of its
    scores, become attention with sinks. Softmax gives the keys the share exp(lse) / (exp(lse) + exp(sink)) of the whole.

    In fp32. The gradient must flow through lse too, or it is wrong in q and k."""
    share = torch.sigmoid(lse.float() - sinks.float()[:, None])  # (B, H, S)
    return (out.float() * share[..., None]).to(out.dtype)


@fused
def flex_sink_attention(q, k, v, sinks, mask):
    """FlexAttention, which makes a fused kernel of any mask. Shapes as in dense_attention, S = T."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (B, heads, S, D)
    options = {
        "BACKEND": "TRITON"
    }  # or for less than 128 queries PyTorch takes its decoding kernel, which fails with our masks
    out, aux = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        kernel_options=options,
    )
    return apply_sinks(out, aux.lse, sinks).transpose(1, 2)


def choose_attention(S, window, documents, device, dtype, head_dim):
    """The attention(q, k, v, sinks) of all layers with this window, over whole sequences of S tokens; prints which, and why.

    documents (B, S) or None. Called once a forward and kind of layer, because a block mask need be made only once."""
    why_not_fused = fast.no_fused_attention(device, head_dim)
    why_not_cudnn = fast.no_cudnn(window, documents, device, dtype, head_dim)
    if why_not_fused:
        fast.say(f"attention, window {window}: dense, because {why_not_fused}")
        return functools.partial(dense_attention, window=window, documents=documents)
    if why_not_cudnn:
        fast.say(f"attention, window {window}: FlexAttention, because {why_not_cudnn}")
        return functools.partial(
            flex_sink_attention, mask=fast.block_mask(S, window, documents, device)
        )
    fast.say(f"attention, window {window}: cuDNN, the fastest where the mask is plainly causal")
    return fast.CudnnSinkAttention.apply


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_heads = kv_heads
        self.qkv = nn.Linear(config.hidden_size, (heads + 2 * kv_heads) * D)
        self.out = nn.Linear(heads * D, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(heads))

    def forward(self, x, cos, sin, attend, remember=None):  # x (B, S, C)
        q, k, v = split_and_rotate(
            self.qkv(x), cos, sin, self.num_key_value_heads
        )  # (B, S, heads, D)
        if remember is not None:  # generation: add k and v to those of earlier calls
            k, v = remember(k, v)  # (B, T, K, D)
        out = sp.ulysses(attend)(q, k, v, self.sinks)  # (B, S, H, D)
        return self.out(out.flatten(2))  # (B, S, H D) -> (B, S, C)


# ----------------------------------------------------------------------------------------------------------------------
# Experts


def swiglu(h, limit):
    """(..., 2F), gates then ups -> (..., F). GPT-OSS's SwiGLU: gate * sigmoid(1.702 gate), nearly GELU, times up + 1;
    gates are clamped from above, ups on both sides. In fp32, then back to h's dtype."""
    gate, up = h.float().chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(h.dtype)


@faster(fast.router_logits)
def router_logits(x, weight, bias):
    """x (N, C), weight (E, C), bias (E) -> (N, E) in fp32: rounded to bf16 they would tie, and tokens go to other experts."""
    return F.linear(x.float(), weight.float(), bias.float())


@faster(fast.experts)
def experts(x, chosen, weights, w1, b1, w2, b2, limit):
    """x (N, C), chosen (N, k) expert numbers, weights (N, k) fp32 -> (N, C): each token's experts, weighted and summed.

    w1 (E, C, 2F) and b1 are gate and up, w2 (E, F, C) and b2 down. No token is dropped. With fast.experts 8K takes 17 % less
    time, 32K 12 %, and 15 GiB less."""
    out = torch.zeros_like(x, dtype=torch.float32)
    for e in range(len(w1)):
        token, place = (chosen == e).nonzero(
            as_tuple=True
        )  # the tokens that chose expert e, and as which of their k
        y = swiglu(x[token] @ w1[e] + b1[e], limit) @ w2[e] + b2[e]
        out = out.index_add(0, token, weights[token, place, None] * y)
    return out.to(x.dtype)


class Experts(nn.Module):
    """A router that picks k of E small MLPs for each token and weights them."""

    def __init__(self, config):
        super().__init__()
        E, C, intermediate = config.num_experts, config.hidden_size, config.intermediate_size
        self.experts_per_token, self.limit = config.experts_per_token, config.swiglu_limit
        self.router = nn.Linear(C, E)
        self.gate_up_weight = nn.Parameter(
            torch.empty(E, C, 2 * intermediate)
        )  # (experts, in, out), gates then ups
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * intermediate))
        self.down_weight = nn.Parameter(torch.empty(E, intermediate, C))
        self.down_bias = nn.Parameter(torch.empty(E, C))
        self.load = (
            0  # (E) tokens each expert was given in training since someone last set this to 0
        )

    def forward(self, x):  # (B, S, C)
        rows = x.flatten(0, 1)  # (N, C)
        logits = router_logits(rows, self.router.weight, self.router.bias)  # (N, E)
        top, chosen = logits.topk(self.experts_per_token, dim=-1)  # (N, k)
        if torch.is_grad_enabled() and not fast.replaying():
            self.load = self.load + F.one_hot(chosen, logits.shape[1]).sum((0, 1))
        parameters = self.gate_up_weight, self.gate_up_bias, self.down_weight, self.down_bias
        return experts(rows, chosen, top.softmax(-1), *parameters, self.limit).view_as(x)


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
# Loss


@faster(fast.logprobs)
def logprobs(x, unembedding, targets):
    """x (N, C), unembedding (V, C), targets (N) -> log p(target) (N) fp32, 0 where not counted. fast.logprobs never holds
    more than LOSS_ROWS rows of logits, which for 64K tokens would take 25 GiB."""
    logits = x @ unembedding.t()  # (N, V)
    picked = logits.float().log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(targets == IGNORED, 0)


@faster(fast.mean_loss)
def mean_loss(x, unembedding, targets, count):
    """The loss, -sum(logprobs) / count. fast.mean_loss makes the gradient while the logits exist: three matmuls, not four."""
    return -logprobs(x, unembedding, targets).sum() / count


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
        count = count.clamp(
            min=1
        ).float()  # no counted target: the loss is 0, and so is its gradient
        return mean_loss(x.flatten(0, 1), self.unembedding.weight, targets.flatten(), count)

    def logprobs(self, tokens, targets, documents=None):
        """log p(targets[b, i] | tokens[b, : i + 1]) (B, S), fp32, differentiable; 0 where the target is -100."""
        self._check(targets, "targets", tokens.shape, IGNORED)
        x = self.features(tokens, documents)
        return logprobs(x.flatten(0, 1), self.unembedding.weight, targets.flatten()).view(
            targets.shape
        )

    def features(self, tokens, documents=None, cache=None):
        """tokens (B, S) -> (B, S, C), what the unembedding makes logits of. cache: see sample.py's KeyValueCache."""
        self._check(tokens, "tokens", tokens.shape)
        config, s = self.config, tokens.shape[1]
        S, start = s * sp.size(), cache.length if cache else 0
        if cache and (documents is not None or sp.size() > 1):
            raise ValueError(
                "a cache is for one document on one rank: give no documents, and no sequence-parallel group"
            )
        if start + S > config.max_position_embeddings:
            raise ValueError(
                f"{start + S} tokens do not fit the model's max_position_embeddings={config.max_position_embeddings}"
            )
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
                x = fast.recomputed(block, *inputs, keep_attention=self.recompute == "attention")
        return self.norm(x)

    def _check(self, ids, name, shape, other=0):
        """ValueError unless `ids` are (B, S) integers in the vocabulary, or `other`."""
        if ids.dim() != 2 or ids.shape != shape or ids.is_floating_point() or not ids.numel():
            raise ValueError(
                f"{name} must be integers of one shape (B, S), not empty; got {ids.dtype} {tuple(ids.shape)}, {tuple(shape)}"
            )
        V, wrong = (
            self.config.vocab_size,
            ids[((ids < 0) | (ids >= self.config.vocab_size)) & (ids != other)],
        )
        if len(wrong):
            raise ValueError(
                f"{name} must lie in [0, vocab_size={V}){f' or be {other}' if other else ''}; found {wrong[0].item()}"
            )

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
                std = (
                    0.02 / math.sqrt(2 * len(self.blocks))
                    if name.endswith(("out.weight", "down_weight"))
                    else 0.02
                )
                generator = torch.Generator(parameter.device).manual_seed(seed * 100003 + number)
                copy_rows(
                    parameter,
                    torch.empty(parameter.shape, device=parameter.device).normal_(
                        0, std, generator=generator
                    ),
                )

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype=None, recompute="none"):
        """The model in `folder`, as save_checkpoint or convert_hf.py wrote it, with weights.load_weights's
        errors. dtype None: that of the first stored tensor, for all."""
        with torch.device("meta"):
            model = cls(GPTOSSConfig.from_json(Path(folder) / "config.json"), recompute)
        model = model.to(dtype or stored_dtype(folder)).to_empty(device=device)
        load_weights(model, folder)
        return model

    def save_checkpoint(self, folder, dtype=None):
        """Write config.json and the parameters, as `dtype` if given, with weights.save_weights's layout and errors."""
        save_weights(self, folder, dtype, write_config=self.config.to_json)
