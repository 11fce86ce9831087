"""GPT-OSS in one file: a mixture-of-experts transformer with sliding windows and attention sinks.

Every step is defined here, in reading order: configuration, norm, rotary positions, attention,
experts, loss, model. Where a definition is marked `@faster(fast.name)`, fast.py has a twin that
computes the same and runs in its place; `with fast.plain():` switches the twins off, and this file
alone is the model. `@fused` compiles a function for a GPU and changes nothing else. Which kernel
computes attention is flash.py's choice. One GPU and eight read the same: sequence parallelism lives
in sp.py and does nothing without a group.

References: the original, https://github.com/openai/gpt-oss (gpt_oss/torch/model.py); the model
card, https://arxiv.org/abs/2508.10925. Differences from the original: expert matrices are
(in, out), with all gate columns before all up columns instead of interleaved (convert_hf.py
reorders them); rotary tables, sinks, router logits and the experts' activation and weighted sum
are in fp32.

Letters in shapes:
    B sequences    S tokens per sequence: this rank's slice, or the full sequence inside attention
    T keys    N = B S tokens    V vocabulary    C hidden size
    H query heads    K key-value heads    D head dim
    E experts    k experts per token    F intermediate size of an expert
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
import flash
import sp
from fast import faster, fused
from weights import copy_rows, load_weights, read_config, save_weights, stored_dtype

IGNORED = -100  # a target that the loss does not count

# --------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class GPTOSSConfig:
    """Sizes of the model; the defaults are gpt-oss-20b's. The names are OpenAI's, but for the last
    two: OpenAI's config.json lacks them, so they are Hugging Face's."""

    num_hidden_layers: int = 24
    num_experts: int = 32
    experts_per_token: int = 4
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880  # of each expert
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int = 128  # keys a query sees in even layers, its own included
    swiglu_limit: float = 7.0
    initial_context_length: int = 4096  # the context before YaRN stretched it
    rope_theta: float = 150000.0
    rope_scaling_factor: float = 32.0
    # dimension pairs that turn less often than alpha over the initial context are interpolated,
    # those that turn more often than beta are left alone: YaRN's beta_slow and beta_fast
    rope_ntk_alpha: float = 1.0
    rope_ntk_beta: float = 32.0
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5

    def __post_init__(self):
        for field in fields(GPTOSSConfig):
            value = getattr(self, field.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            number = number and 0 < value < math.inf
            if not number or (field.type is int and value != int(value)):
                raise ValueError(f"{field.name}={value!r} must be a positive {field.type.__name__}")
            setattr(self, field.name, field.type(value))
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.rope_theta <= 1:
            raise ValueError(
                f"rope_theta={self.rope_theta}, the base of rotary angles, must be greater than 1"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions"
            )
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must be at most "
                f"num_experts={self.num_experts}"
            )

    @classmethod
    def gpt_oss_20b(cls):
        return cls()

    @classmethod
    def gpt_oss_120b(cls):
        return cls(num_hidden_layers=36, num_experts=128)

    @classmethod
    def from_json(cls, path):
        """Read a config.json, ours, OpenAI's or Hugging Face's. Errors: see weights.read_config."""
        return read_config(path, cls)

    def to_json(self, path):
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def window(self, layer):
        """How many keys a query of this layer sees, its own included; None: no limit."""
        return self.sliding_window if layer % 2 == 0 else None


# --------------------------------------------------------------------------------------------------
# Norm and rotary positions


def wide(x):
    """x in fp32, or in fp64 if it is in fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@fused
def rms_norm(x, weight, eps):
    """x (..., C) divided by its root mean square, times weight (C). Computed in fp32,
    returned in x's dtype."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight)).to(x.dtype)  # multiplied before the cast: Llama casts first


class RMSNorm(nn.Module):
    """https://arxiv.org/abs/1910.07467"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def rope_tables(config, positions):
    """cos and sin (S, D/2), fp32, of the angle by which each pair of dimensions turns at each
    position. YaRN (https://arxiv.org/abs/2309.00071) stretches the context: slow pairs turn
    rope_scaling_factor times slower, fast ones as trained, those between by a linear ramp."""
    D = config.head_dim
    pair = torch.arange(D // 2, dtype=torch.float32, device=positions.device)
    trained = 1 / config.rope_theta ** (2 * pair / D)  # radians per token
    stretched = trained / config.rope_scaling_factor

    def pair_with(turns):  # the (fractional) pair that makes `turns` over the initial context
        length = config.initial_context_length / (turns * 2 * math.pi)
        return D / 2 * math.log(length) / math.log(config.rope_theta)

    low = max(pair_with(config.rope_ntk_beta), 0)
    high = min(pair_with(config.rope_ntk_alpha), D - 1)  # for gpt-oss: from pair 8.1 to 17.4
    ramp = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    angles = wide(positions[:, None]) * (stretched * ramp + trained * (1 - ramp))  # (S, D/2)
    # YaRN's attention factor: in the tables it multiplies q and k, so scores by its square
    attention_factor = 0.1 * math.log(max(config.rope_scaling_factor, 1)) + 1
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate(x, cos, sin):
    """x (B, S, heads, D): turn the pairs (x[i], x[i + D/2]). Computed in fp32, returned in
    x's dtype."""
    a, b = wide(x).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]  # (S, 1, D/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@fused
def split_and_rotate(qkv, cos, sin, num_key_value_heads):
    """qkv (B, S, (H + 2K) D) -> q (B, S, H, D), k and v (B, S, K, D), with q and k rotated."""
    D, K = 2 * cos.shape[-1], num_key_value_heads
    heads = qkv.unflatten(-1, (-1, D))  # (B, S, H + 2K, D)
    q, k, v = heads.split((heads.shape[2] - 2 * K, K, K), dim=2)
    # a view of v would keep all of qkv in memory for the backward
    return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()


# --------------------------------------------------------------------------------------------------
# Attention with sinks. Each head has a learned logit, its sink, that takes part in the softmax but
# has no value vector: a head with nothing to attend to can attend to its sink, and adds nothing.
# H/K query heads share a key-value head: query head h reads key-value head h // (H/K).


def dense_attention(q, k, v, sinks, window=None, documents=None):
    """The definition: scores, mask, a column for the sink, softmax, column dropped.

    q (B, S, H, D), k and v (B, T, K, D), sinks (H) -> (B, S, H, D). The queries are the last S of T
    positions. A query sees the keys at and before its own position: only the last `window` of them
    if a window is given, and only those of its document if documents (B, T) are given. Any device,
    any dtype; memory grows with H S T."""
    B, S, H, D = q.shape
    T, K = k.shape[1], k.shape[2]
    q = q.unflatten(2, (K, H // K))  # (B, S, K, H/K, D)
    scores = wide(torch.einsum("bskhd,btkd->bkhst", q, k)) / math.sqrt(D)
    positions = torch.arange(T, device=q.device)
    distance = positions[T - S :, None] - positions  # (S, T)
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    if documents is not None:
        same = documents[:, T - S :, None] == documents[:, None, :]  # (B, S, T)
        visible = (visible & same)[:, None, None]  # (B, 1, 1, S, T)
    scores = scores.masked_fill(~visible, float("-inf"))
    column = wide(sinks).view(1, K, H // K, 1, 1).expand(B, -1, -1, S, 1)  # not scaled by sqrt(D)
    probs = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]  # (B, K, H/K, S, T)
    return torch.einsum("bkhst,btkd->bskhd", probs.to(v.dtype), v).flatten(2, 3)  # (B, S, H, D)


def apply_sinks(out, lse, sinks):
    """Add the sinks after attention: out (B, H, S, D) of attention without sinks and the logsumexp
    of its scores, lse (B, H, S) -> attention with sinks. In the softmax that includes the sink,
    the keys have the share exp(lse) / (exp(lse) + exp(sink)) = sigmoid(lse - sink).

    In fp32. The gradient must flow through lse too, or dq and dk are wrong."""
    share = torch.sigmoid(wide(lse) - wide(sinks)[:, None])  # (B, H, S)
    return (wide(out) * share[..., None]).to(out.dtype)


@fused
def flex_sink_attention(q, k, v, sinks, mask):
    """dense_attention by FlexAttention, which compiles a fused kernel for the BlockMask `mask`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # it wants (B, heads, S, D)
    out, aux = flex_attention(
        q,
        k,
        v,
        block_mask=mask,
        enable_gqa=True,
        return_aux=AuxRequest(lse=True),
        # below 128 queries PyTorch would pick its decoding kernel, which fails with our masks
        kernel_options={"BACKEND": "TRITON"},
    )
    return apply_sinks(out, aux.lse, sinks).transpose(1, 2)


def choose_attention(S, window, documents, device, dtype, head_dim):
    """The attention(q, k, v, sinks) of layers with this window, over full sequences of S tokens.

    documents (B, S) or None. Called once per forward and window: each block mask is built once."""
    kernel = flash.choose_kernel(window, documents, device, dtype, head_dim)
    if kernel == "cuDNN":
        return flash.cudnn_sink_attention
    if kernel == "by document" and (plan := flash.plan_documents(documents)):
        return functools.partial(flash.document_attention, plan=plan)
    if kernel != "dense":  # also for documents that have no such plan
        mask = flash.block_mask(S, window, documents, device)
        return functools.partial(flex_sink_attention, mask=mask)
    return functools.partial(dense_attention, window=window, documents=documents)


class Attention(nn.Module):
    """Grouped-query attention over the full sequence, of which each rank holds a slice."""

    def __init__(self, config):
        super().__init__()
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_heads = K
        self.qkv = nn.Linear(config.hidden_size, (H + 2 * K) * D)
        self.out = nn.Linear(H * D, config.hidden_size)
        self.sinks = nn.Parameter(torch.empty(H))

    def forward(self, x, cos, sin, attend):  # x (B, S, C)
        q, k, v = split_and_rotate(self.qkv(x), cos, sin, self.num_key_value_heads)
        # on several ranks: exchanged for full sequences of a part of the heads, and back
        out = sp.ulysses(attend)(q, k, v, self.sinks)  # (B, S, H, D)
        return self.out(out.flatten(2))  # (B, S, H D) -> (B, S, C)


# --------------------------------------------------------------------------------------------------
# Mixture of experts: a router picks k of E small MLPs for each token and weights their outputs


def swiglu(h, limit):
    """h (..., 2F), gates then ups -> (..., F): gate * sigmoid(1.702 gate), nearly GELU, times
    up + 1. Gates are clamped from above, ups on both sides. Computed in fp32, returned in h's
    dtype."""
    gate, up = wide(h).chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(1.702 * gate)).to(h.dtype)


@faster(fast.router_logits)
def router_logits(x, weight, bias):
    """x (N, C), weight (E, C), bias (E) -> (N, E), in fp32: in bf16 close logits tie, and top-k
    picks one of them arbitrarily."""
    return F.linear(wide(x), wide(weight), wide(bias))


@faster(fast.experts)
def experts(x, chosen, routing, w1, b1, w2, b2, limit):
    """x (N, C), chosen (N, k) expert numbers, routing (N, k) their weights, fp32 -> (N, C): the
    outputs of each token's experts, weighted and summed. No token is dropped.

    w1 (E, C, 2F) and b1 (E, 2F): gate_up, w2 (E, F, C) and b2 (E, C): down."""
    out = torch.zeros_like(wide(x))
    for e in range(len(w1)):
        token, place = (chosen == e).nonzero(as_tuple=True)  # tokens that chose e, as which of k
        y = swiglu(x[token] @ w1[e] + b1[e], limit) @ w2[e] + b2[e]
        out = out.index_add(0, token, routing[token, place, None] * y)
    return out.to(x.dtype)


class Router(nn.Linear):
    """x (N, C) -> chosen (N, k), the experts of the k largest logits unless given, and routing
    (N, k), fp32, the softmax over those k logits alone."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.num_experts)
        self.experts_per_token = config.experts_per_token

    def logits(self, x):  # lora.py adds to them
        return router_logits(x, self.weight, self.bias)  # (N, E)

    def forward(self, x, chosen=None):
        logits = self.logits(x)
        if chosen is None:
            chosen = logits.topk(self.experts_per_token, dim=-1).indices
        return chosen, logits.gather(-1, chosen).softmax(-1)


class Experts(nn.Module):
    def __init__(self, config):
        super().__init__()
        E, C, inner = config.num_experts, config.hidden_size, config.intermediate_size  # inner: F
        self.limit = config.swiglu_limit
        self.router = Router(config)
        self.gate_up_weight = nn.Parameter(torch.empty(E, C, 2 * inner))  # gates, then ups
        self.gate_up_bias = nn.Parameter(torch.empty(E, 2 * inner))
        self.down_weight = nn.Parameter(torch.empty(E, inner, C))
        self.down_bias = nn.Parameter(torch.empty(E, C))

    def forward(self, x, chosen=None):  # x (B, S, C), chosen (B, S, k) or None
        tokens = x.flatten(0, 1)  # (N, C)
        chosen, routing = self.router(tokens, None if chosen is None else chosen.flatten(0, 1))
        return self.compute(tokens, chosen, routing).view_as(x)

    def compute(self, tokens, chosen, routing):  # (N, C), (N, k), (N, k) -> (N, C)
        # frozen.py has another way, for weights that are not trained
        gate_up, down = (self.gate_up_weight, self.gate_up_bias), (self.down_weight, self.down_bias)
        return experts(tokens, chosen, routing, *gate_up, *down, self.limit)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Experts(config)

    def forward(self, x, cos, sin, attend, chosen=None):  # x (B, S, C)
        x = x + self.attention(self.attention_norm(x), cos, sin, attend)
        return x + self.mlp(self.mlp_norm(x), chosen)


# --------------------------------------------------------------------------------------------------
# Loss


def pick(logits, targets):
    """logits (N, V), targets (N) -> log p(target) (N), 0 where ignored."""
    picked = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked.masked_fill(targets == IGNORED, 0)


@faster(fast.logprobs)
def logprobs(x, unembedding, targets, temperature):
    """x (N, C), unembedding (V, C), targets (N) -> log p(target) (N), fp32; 0 where ignored."""
    return pick(wide(x @ unembedding.t()) / temperature, targets)


@faster(fast.logprobs_and_entropy)
def logprobs_and_entropy(x, unembedding, targets, temperature):
    """As logprobs, and the entropy of the whole distribution (N), fp32, in nats."""
    logits = wide(x @ unembedding.t()) / temperature  # (N, V)
    logp = logits.log_softmax(-1)
    return pick(logits, targets), -(logp.exp() * logp).sum(-1)


@faster(fast.mean_loss)
def mean_loss(x, unembedding, targets, weights, count):
    """-sum(weights * log p(target)) / count, fp32. weights (N), or None for ones."""
    picked = logprobs(x, unembedding, targets, 1.0)
    return -(picked if weights is None else weights * picked).sum() / count


# --------------------------------------------------------------------------------------------------
# The model


class GPTOSS(nn.Module):
    """GPT-OSS, initialised by init_weights, unless it is built on the meta device.

    `recompute` selects what the backward recomputes, block by block, to save memory:
        "none": nothing
        "all": everything but the block's input
        "attention": as "all", but the output of attention is kept on layers without a window, where
            recomputing it takes time that grows with S^2. Where FlexAttention runs, this is "all".
    The last `keep_blocks` blocks recompute nothing."""

    def __init__(self, config, recompute="none", keep_blocks=0):
        super().__init__()
        if recompute not in ("none", "attention", "all"):
            raise ValueError(f"recompute={recompute!r}: choose none, attention or all")
        self.config, self.recompute, self.keep_blocks = config, recompute, keep_blocks
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.unembedding = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed=0):
        """Set every parameter, to the same values on any number of ranks.

        Matrices: normal with GPT-2's 0.02, divided by sqrt(2 layers) where they write into the
        residual stream. Norms: one. Biases and sinks: zero."""
        for number, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("bias", "sinks")):
                nn.init.zeros_(parameter)
            else:
                residual = name.endswith(("out.weight", "down_weight"))
                std = 0.02 / math.sqrt(2 * len(self.blocks)) if residual else 0.02
                device = parameter.device
                generator = torch.Generator(device).manual_seed(seed * 100003 + number)
                full = torch.empty(parameter.shape, device=device)
                copy_rows(parameter, full.normal_(0, std, generator=generator))  # this rank's

    def forward(
        self, tokens, targets=None, documents=None, count=None, *, weights=None, routes=None
    ):
        """tokens (B, S) int64 -> logits (B, S, V); with targets (B, S), the tokens that follow, the
        loss in fp32, which the fast twin computes without holding the logits of all tokens.

        loss = -sum(weights * log p(target)) / count, over the targets that are not -100. weights
        (B, S), such as advantages, are ones by default. count, a 0-d tensor, is by default the
        number of those targets; for a part of a batch pass that of the whole batch.

        documents (B, S): attention never crosses from one number to another. routes: the experts to
        use, as the method `routes` returns them. In a sequence-parallel group every (B, S) tensor
        is this rank's slice, the default count is the group's, and the ranks' losses add up to the
        loss. ValueError for ids outside the vocabulary or wrong shapes."""
        if targets is None:
            return self.unembedding(self.features(tokens, documents, routes=routes))
        self._check_targets(targets, tokens)
        if weights is not None:
            if weights.shape != tokens.shape:
                raise ValueError(
                    f"weights must be of shape {tuple(tokens.shape)}; got {tuple(weights.shape)}"
                )
            weights = wide(weights.flatten())
        x = self.features(tokens, documents, routes=routes).flatten(0, 1)
        if count is None:
            count = sp.all_reduce((targets != IGNORED).sum())
        count = wide(count.clamp(min=1))  # without any target the loss is 0, and so is its gradient
        return mean_loss(x, self.unembedding.weight, targets.flatten().long(), weights, count)

    def logprobs(
        self, tokens, targets, documents=None, *, temperature=1.0, entropy=False, routes=None
    ):
        """log p(targets[b, i] | tokens[b, : i + 1]), (B, S) fp32, differentiable; 0 where the
        target is -100. With entropy=True the pair of that and every position's entropy (B, S) in
        nats. Both of logits / temperature. Other arguments and errors as in forward."""
        self._check_targets(targets, tokens)
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive")
        x = self.features(tokens, documents, routes=routes).flatten(0, 1)
        inputs = x, self.unembedding.weight, targets.flatten().long(), float(temperature)
        if not entropy:
            return logprobs(*inputs).view(targets.shape)
        return tuple(each.view(targets.shape) for each in logprobs_and_entropy(*inputs))

    @torch.no_grad()
    def routes(self, tokens, documents=None):
        """The experts each layer's router chooses for each token: (layers, B, S, k) int64.

        Given to forward or logprobs as `routes`, they fix the choice, and gradients still flow
        through the routing weights. So a policy can be trained on the routes of its samples."""
        found = []
        hooks = [
            block.mlp.router.register_forward_hook(lambda _, __, output: found.append(output[0]))
            for block in self.blocks
        ]
        try:
            self.features(tokens, documents)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(found).unflatten(1, tokens.shape)  # (layers, N, k) -> (layers, B, S, k)

    def features(self, tokens, documents=None, routes=None):
        """tokens (B, S) -> (B, S, C), the input of the unembedding."""
        self._check_ids(tokens, "tokens")
        self._check_vocabulary(tokens, "tokens")
        config, s = self.config, tokens.shape[1]
        S = s * sp.size()  # the full sequence, of which this rank has s tokens
        if config.max_position_embeddings < S:
            raise ValueError(
                f"{S} tokens exceed max_position_embeddings={config.max_position_embeddings}"
            )
        if documents is not None:
            self._check_integers(documents, "documents", tokens.shape)
            documents = sp.gather_sequence(documents)
        if routes is not None:
            shape = len(self.blocks), *tokens.shape, config.experts_per_token
            self._check_integers(routes, "routes", shape)
            if not 0 <= routes.min() <= routes.max() < config.num_experts:
                raise ValueError(f"routes must lie in [0, num_experts={config.num_experts})")
            routes = routes.long()
        x = self.embedding(tokens)  # (B, S, C)
        cos, sin = rope_tables(config, sp.positions(s, tokens.device))
        attend = {
            window: choose_attention(S, window, documents, x.device, x.dtype, config.head_dim)
            for window in (config.sliding_window, None)
        }
        for layer, block in enumerate(self.blocks):
            chosen = None if routes is None else routes[layer]
            inputs = x, cos, sin, attend[config.window(layer)], chosen
            kept = self.recompute == "none" or layer >= len(self.blocks) - self.keep_blocks
            if kept or not torch.is_grad_enabled():
                x = block(*inputs)
            else:
                keep_attention = self.recompute == "attention"
                x = fast.recomputed(block, *inputs, keep_attention=keep_attention)
        return self.norm(x)

    def _check_integers(self, x, name, shape):
        if x.shape != shape or x.is_floating_point() or x.dtype == torch.bool:
            raise ValueError(
                f"{name} must be integers of shape {tuple(shape)}; got {x.dtype} {tuple(x.shape)}"
            )

    def _check_targets(self, targets, tokens):
        """ValueError for wrong targets. The tokens' shape is checked first, or the targets would be
        blamed for it; features checks their values."""
        self._check_ids(tokens, "tokens")
        self._check_ids(targets, "targets", tokens.shape)
        self._check_vocabulary(targets, "targets", IGNORED)

    def _check_ids(self, ids, name, shape=None):
        """ValueError unless `ids` are int64 or int32 of the tokens' shape; for tokens, any (B, S)
        that is not empty."""
        if shape is None:
            right, wanted = ids.dim() == 2 and ids.numel(), "shape (B, S), not empty"
        else:
            right, wanted = ids.shape == shape, f"the tokens' shape {tuple(shape)}"
        if not right or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"{name} must be int64 or int32 of {wanted}; got {ids.dtype} {tuple(ids.shape)}"
            )

    def _check_vocabulary(self, ids, name, ignored=None):
        """ValueError unless `ids` are in the vocabulary, or `ignored`."""
        V = self.config.vocab_size
        outside = (ids < 0) | (ids >= V)
        wrong = ids[outside if ignored is None else outside & (ids != ignored)]
        if len(wrong):
            exception = "" if ignored is None else f" or be {ignored}"
            raise ValueError(
                f"{name} must lie in [0, vocab_size={V}){exception}; found {wrong[0].item()}"
            )

    @classmethod
    def from_checkpoint(cls, folder, device="cpu", dtype=None, recompute="none"):
        """The model in `folder`, written by save_checkpoint or convert_hf.py, in `dtype` or that of
        the first stored tensor. Errors: see weights.load_weights."""
        with torch.device("meta"):
            model = cls(GPTOSSConfig.from_json(Path(folder) / "config.json"), recompute)
        model = model.to(dtype or stored_dtype(folder)).to_empty(device=device)
        load_weights(model, folder)
        return model

    def save_checkpoint(self, folder, dtype=None):
        """Write config.json and the parameters, in `dtype` if given. Layout and errors: see
        weights.save_weights."""
        save_weights(self, folder, dtype, write_config=self.config.to_json)
