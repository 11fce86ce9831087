"""The arithmetic of a run: FLOPs of the model, bytes on a GPU, bytes between GPUs. plan.py prints
it.

FLOPs are model FLOPs unless said otherwise: nothing recomputed, active experts only, and only the
keys that a query may see (Chowdhery et al., https://arxiv.org/abs/2204.02311)."""

import torch

from fast import EXPERT_TOKENS, LOSS_TOKENS
from model import GPTOSS

GIB = 2**30

# --------------------------------------------------------------------------------------------------
# FLOPs


def matrices(config):
    """{name: (times a token uses it, inputs, outputs)} of a block's matrices and of the
    unembedding."""
    C, F, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    return {
        "qkv": (1, C, heads + 2 * kv_heads),
        "out": (1, heads, C),
        "router": (1, C, config.num_experts),
        "gate_up": (k, C, 2 * F),
        "down": (k, F, C),
        "unembedding": (1, C, config.vocab_size),
    }


def visible_pairs(seq_len, window):
    """Pairs of a query and a key it may see, in a sequence of `seq_len`; window None: all before
    it."""
    w = min(window or seq_len, seq_len)
    return seq_len * w - w * (w - 1) // 2  # the first w queries see 1 … w keys, the others w


def attention_flops(config, seq_len, window):
    """FLOPs of one layer's attention forward over one sequence: scores and values."""
    return 4 * config.num_attention_heads * config.head_dim * visible_pairs(seq_len, window)


def forward_flops(config, seq_len, layers=None):
    """{name: FLOPs} of the forward over one sequence of `seq_len`, summed over `layers` (default:
    all). Names are those of `matrices`, and "causal" and "window" for the attention of the two
    kinds of layers."""
    layers = range(config.num_hidden_layers) if layers is None else layers
    flops = {
        name: len(layers) * seq_len * uses * 2 * inputs * outputs
        for name, (uses, inputs, outputs) in matrices(config).items()
    }
    flops["unembedding"] = 2 * seq_len * config.hidden_size * config.vocab_size  # not in each layer
    windows = [config.window(layer) for layer in layers]
    for name, window in ("causal", None), ("window", config.sliding_window):
        flops[name] = windows.count(window) * attention_flops(config, seq_len, window)
    return flops


def backward_forwards(name):
    """How many forwards the backward of an operation of `forward_flops` costs a GPU: a matmul has
    two gradients; attention's kernels also recompute the scores
    (https://arxiv.org/abs/2307.08691)."""
    return 2.5 if name in ("causal", "window") else 2


def flops_per_token(config, seq_len, frozen=False):
    """Model FLOPs of training on one token of a sequence of `seq_len`: forward, and twice that
    backward. Frozen matrices have no gradient: their backward is one forward; adapters count for
    nothing."""
    forward = forward_flops(config, seq_len)
    backward = {name: 1 if frozen and name in matrices(config) else 2 for name in forward}
    return sum(flops * (1 + backward[name]) for name, flops in forward.items()) / seq_len


# What a recomputed block computes twice. Not `down`: no backward reads its output. The unembedding
# is in no block.
RECOMPUTED = {
    "none": (),
    "attention": ("qkv", "out", "router", "gate_up", "window"),
    "all": ("qkv", "out", "router", "gate_up", "window", "causal"),
}


def recomputed_flops(config, seq_len, recompute, keep_blocks):
    """FLOPs per token that recomputation adds to `flops_per_token`."""
    recomputed = range(max(config.num_hidden_layers - keep_blocks, 0))
    flops = forward_flops(config, seq_len, recomputed)
    return sum(flops[name] for name in RECOMPUTED[recompute]) / seq_len


def flops_of(config, documents, frozen=False):
    """Model FLOPs of training on sequences of packed documents (B, S): attention stays inside each
    document. frozen: see flops_per_token."""
    lengths = [
        n
        for sequence in documents
        for n in sequence.unique_consecutive(return_counts=True)[1].tolist()
    ]
    return sum(n * flops_per_token(config, n, frozen) for n in lengths)


# dense bf16 FLOP/s, from NVIDIA's data sheets
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device):
    """The peak rate of this GPU, or None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK.items() if gpu in name), None)


# --------------------------------------------------------------------------------------------------
# Bytes

# of a parameter: weight, gradient, optimizer
BYTES = {"fp32": (4, 4, 8), "split": (2, 2, 6)}


# Where FSDP copies gradients from fp32 to bf16, they live in the memory of its own stream (see
# memory.ReduceScatter), which the computation cannot use; with a few GiB more, in six measured runs
# of the 20b on eight ranks about a block's gradients in bf16 and fp32, it is reserved and unused.
RESERVED = "reserved by FSDP's streams"


def adds_in_bf16(ranks, optimizer):
    """True if gradients are summed over the ranks in bf16 rather than fp32: with two ranks the sum
    is rounded to bf16 once either way, and half as much is sent."""
    return ranks <= 2 and optimizer != "fp32"


def estimate(
    config,
    *,
    parameters,
    ranks,
    sp,
    replicas,
    seq_len,
    micro_batch,
    optimizer,
    recompute,
    offload,
    keep_blocks=0,
    micro_batches=1,
    states=None,
):
    """Memory of one rank in training, for a computation in bf16: {what for: bytes}, which add up to
    the peak. Counted by hand from model.py, fast.py and FSDP2, for one document per sequence.
    states: {optimizer: bytes per parameter of its state}, where it is not AdamW's.

    The peak is in the loss or in the backward of a block. From the last block to the first, the
    backward frees what the forward kept and makes gradients; in later micro-batches of a step all
    gradients are there from the start."""
    C, F, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    V, L = config.vocab_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * max(config.num_key_value_heads, sp) * config.head_dim
    tokens = micro_batch * seq_len // sp
    block, ends = (parameters - 2 * V * C - C) // L, 2 * V * C  # ends: embedding, unembedding
    sizes = (*BYTES[optimizer][:2], (states or {}).get(optimizer, BYTES[optimizer][2]))
    weight, gradient, moments = (size * parameters * replicas // ranks for size in sizes)
    summed = 2 if adds_in_bf16(ranks, optimizer) else 4  # bytes of a gradient as it is summed
    # FSDP copies sums in fp32 to gradients in bf16 with replicas; else memory.ReduceScatter does
    copied = optimizer != "fp32" and summed == 4 and replicas > 1
    held = 0
    if replicas > 1 and (copied or micro_batches > 1):
        # the sums of all blocks, until the replicas have added theirs
        held = summed * parameters * replicas // ranks

    # What the forward keeps of each block for the backward. A block's tensors: its input; x after
    # attention and both norms; q, k, v; attention's out, twice where FlexAttention's sinks or the
    # all-to-all make another; gates and ups.
    given, gates = 2 * tokens * C, 2 * tokens * k * 2 * F
    outs = 2 * heads if sp > 1 else 3 * heads // 2
    inside = 2 * tokens * (3 * C + qkv + outs)
    # "attention" stores attention's out, and its logsumexp in fp32, of the full layers
    stored = tokens * (2 * heads + 4 * config.num_attention_heads)
    stored = [stored * (recompute == "attention" and not config.window(i)) for i in range(L)]
    whole = L if recompute == "none" else min(keep_blocks, L)  # blocks that recompute nothing
    kept = [
        given + inside + gates if i >= L - whole else given * (not offload) + stored[i]
        for i in range(L)
    ]

    # What a block's backward needs beside that: in experts, per choice of an expert, x, its
    # gradient, gates and ups, their gradients and so on; or in attention the gradients of q, k, v
    # and out, and cuDNN's gradient of q in fp32, when the tensors of the experts' half are gone
    tiled = tokens > EXPERT_TOKENS  # then a tile's last tensors overlap with the next tile's
    choices = k * min(tokens, EXPERT_TOKENS)
    experts = 2 * choices * ((3 + tiled) * C + 6 * F) + 4 * block * tiled  # fp32 sums of gradients
    attention = 2 * tokens * (qkv + 3 * heads) - 2 * given
    stream = 3 * given + 2 * given * offload  # x, its gradients; inputs on their way back

    def backward(i):
        gradients = gradient if micro_batches > 1 else gradient * (L - 1 - i) * block // parameters
        of_experts = experts - (2 * choices * 2 * F if i >= L - whole else 0)
        replayed = 0 if i >= L - whole else inside - stored[i]
        # in bf16 this block, the next one, and the ends; this block's gradients; those of the
        # block before, as they are summed; the unembedding's
        gathered = 2 * (2 * block if i else block) + 2 * ends + 2 * block
        gathered += summed * block * (i < L - 1) + ends
        unused = gradient - gradients + 6 * block if copied else 0
        return {
            "weights": weight,
            "optimizer": moments,
            "gradients, kept activations": gradients + sum(kept[: i + 1]),
            "gathered by FSDP": gathered + held,
            "working set": replayed + max(of_experts, attention) + stream,
            **({RESERVED: unused} if copied else {}),
        }

    at_loss = backward(L - 1)
    at_loss["gathered by FSDP"] = 2 * (block + ends) + held
    at_loss["working set"] = LOSS_TOKENS * V * 2 + V * C * (4 + 2) + 2 * given
    return max((at_loss, *map(backward, range(L))), key=lambda needs: sum(needs.values()))


def count_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPTOSS(config).parameters())


def sent_bytes(
    config,
    *,
    parameters,
    ranks,
    sp,
    replicas,
    seq_len,
    micro_batch,
    micro_batches,
    optimizer,
    recompute,
    keep_blocks,
    adapters=None,
    **_,
):
    """{kind of collective: bytes} that one rank sends in a step, for a computation in bf16. Without
    the few numbers of a step's loss, and for sizes that the ranks divide evenly."""
    shards, L = ranks // replicas, config.num_hidden_layers
    ends = 2 * config.vocab_size * config.hidden_size + config.hidden_size
    summed = 2 if adds_in_bf16(ranks, optimizer) else 4
    # memory.ReduceScatter sends what is kept in bf16 in bf16, and adds it up in fp32
    scattered = 2 if optimizer != "fp32" and replicas == 1 else summed
    # weights are gathered for the forward and again for the backward, those outside of blocks once
    gathered = 2 * (2 * (parameters - ends) + ends)
    if adapters:  # `parameters` are theirs, and frozen weights are gathered only if they are shared
        trained = len(adapters["ends"]) * config.vocab_size * config.hidden_size
        gathered = 2 * (2 * (parameters - trained) + trained)
        gathered += adapters["shared"] * (2 * adapters["frozen"] - 2 * (ends - trained))
    # all-to-all: q, k, v and out, in the forward, its replay and the backward
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * max(config.num_key_value_heads, sp) * config.head_dim
    replayed = 0 if recompute == "none" else max(L - keep_blocks, 0)
    tokens = micro_batch * seq_len // sp
    exchanged = 2 * tokens * (2 * L + replayed) * (qkv + heads)
    per_micro_batch = {
        "all_gather": gathered * (shards - 1) // shards,
        "reduce_scatter": scattered * parameters * (shards - 1) // shards,
        "all_to_all": exchanged * (sp - 1) // sp,
        "all_reduce": 2 * summed * parameters // shards * (replicas - 1) // replicas,
    }
    return {kind: micro_batches * size for kind, size in per_micro_batch.items()}
