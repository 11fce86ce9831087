"""The arithmetic of a run: FLOPs of the model, bytes on a GPU, and the dry run that prints them.

FLOPs are model FLOPs unless said otherwise: nothing recomputed, active experts only, and only the
keys that a query may see (Chowdhery et al., https://arxiv.org/abs/2204.02311)."""

import os

import torch

from fast import EXPERT_TOKENS, LOSS_TOKENS
from loop.options import check_ranks, model_config
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


def flops_per_token(config, seq_len):
    """Model FLOPs of training on one token of a sequence of `seq_len`: forward, and twice that
    backward."""
    return 3 * sum(forward_flops(config, seq_len).values()) / seq_len


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


def flops_of(config, documents):
    """Model FLOPs of training on sequences of packed documents (B, S): attention stays inside each
    document."""
    lengths = [
        n
        for sequence in documents
        for n in sequence.unique_consecutive(return_counts=True)[1].tolist()
    ]
    return sum(n * flops_per_token(config, n) for n in lengths)


# dense bf16 FLOP/s, from NVIDIA's data sheets
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}


def peak_flops(device):
    """The peak rate of this GPU, or None if it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK.items() if gpu in name), None)


# --------------------------------------------------------------------------------------------------
# Bytes

# of a parameter: weight, gradient, optimizer
BYTES = {"fp32": (4, 4, 8), "split": (2, 2, 6), "bf16": (2, 2, 4)}


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
):
    """Memory of one rank in training, for a computation in bf16: {what for: bytes}, which add up to
    the peak. Counted by hand from model.py and fast.py.

    The backward frees what the forward kept, block by block, as it makes the gradients. The last
    blocks keep most and are freed first, so in a step's first micro-batch only the larger of the
    two counts; in later ones the gradients are already there. Both count when FSDP sums gradients
    in fp32 and keeps them in bf16: that copy lives in the communication stream's pool (see
    memory.ReduceScatter)."""
    C, F, V, L = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_hidden_layers,
    )
    heads = config.num_attention_heads * config.head_dim
    kv_heads = max(config.num_key_value_heads, sp) * config.head_dim
    tokens = micro_batch * seq_len // sp
    block = (parameters - 2 * V * C - C) // L
    weight, gradient, moments = (size * parameters * replicas // ranks for size in BYTES[optimizer])
    summed = 2 if adds_in_bf16(ranks, optimizer) else 4  # bytes of a gradient as it is summed
    # two blocks, embedding and unembedding whole in bf16; a block's gradients whole in bf16, and as
    # they are summed
    gathered = 2 * (2 * block + 2 * V * C) + (2 + summed) * block
    copied = optimizer != "fp32" and summed == 4  # gradients, to the dtype they are kept in
    if replicas > 1 and (copied or micro_batches > 1):
        # the sums of all blocks, held until the replicas have added theirs
        gathered += summed * parameters * replicas // ranks
    k = config.experts_per_token
    whole = L if recompute == "none" else min(keep_blocks, L)  # blocks that recompute nothing
    # x before and after both norms; q, k, v; attention's out, a second one after FlexAttention's
    # sinks or the all-to-all, so on half of the layers or on all; gates and ups
    outs = 2 * heads if sp > 1 else 3 * heads // 2
    kept = 2 * tokens * whole * (4 * C + (heads + 2 * kv_heads) + outs + k * 2 * F)
    kept += 2 * tokens * C * min(L - whole, 2 if offload else L)
    if recompute == "attention":  # out, and its logsumexp in fp32, of the full layers
        kept += tokens * (2 * heads + 4 * config.num_attention_heads) * ((L - whole) // 2)
    # the largest of attention's backward, a tile of experts, and the loss; with the residual stream
    # and its gradient
    attention = 2 * tokens * (4 * (heads + 2 * kv_heads) + 3 * heads)
    tiled = tokens > EXPERT_TOKENS  # then the experts' gradients are summed in fp32
    experts = 2 * min(tokens, EXPERT_TOKENS) * k * (4 * C + 6 * F) + (4 * block if tiled else 0)
    loss = LOSS_TOKENS * V * 2 + V * C * (4 + 2) + 2 * tokens * C
    both = micro_batches > 1 or copied
    return {
        "weights": weight,
        "optimizer": moments,
        "gradients, kept activations": gradient + kept if both else max(gradient, kept),
        "gathered by FSDP": gathered,
        "working set": max(attention, experts, loss) + 4 * 2 * tokens * C,
    }


# --------------------------------------------------------------------------------------------------
# What a run will need


def arithmetic(options, config, parameters, ranks):
    """What a step consists of, in words. Its FLOPs are an upper bound: packed documents have less
    attention."""
    groups, tokens = ranks // options.sp, options.batch_size * options.seq_len
    micro_batches = options.batch_size // groups // options.micro_batch
    flops = flops_per_token(config, options.seq_len)
    again = recomputed_flops(config, options.seq_len, options.recompute, options.keep_blocks)
    more = f", and {again / flops:.0%} more for what is recomputed" if again else ""
    return (
        f"{parameters:,} parameters, optimizer {options.optimizer} at "
        f"{sum(BYTES[options.optimizer])} bytes each\n"
        f"{tokens:,} tokens a step = {count(micro_batches, 'micro-batch', 'es')} x "
        f"{count(groups, 'group')} (sp {options.sp}) x {count(options.micro_batch, 'sequence')} x "
        f"{options.seq_len:,} tokens; "
        f"{flops * tokens:.3g} FLOPs{more}, if each sequence is one document"
    )


def count(number, what, plural="s"):
    return f"{number} {what}{plural if number != 1 else ''}"


def dry_run(options):
    """Print what the run will need."""
    ranks, config = int(os.environ.get("WORLD_SIZE", options.ranks)), model_config(options)
    check_ranks(options, config, ranks)
    if os.environ.get("RANK", "0") != "0":
        return
    parameters = count_parameters(config)
    needs = needs_of(options, config, parameters, ranks)
    print(arithmetic(options, config, parameters, ranks))
    for what, size in needs.items():
        print(f"{size / GIB:8.1f} GiB  {what}")
    total = sum(needs.values()) / GIB
    print(f"{total:8.1f} GiB  peak of each of {ranks} GPUs, without what CUDA and NCCL take")
    if options.offload:  # the last block's output goes there, too
        hidden = options.micro_batch * options.seq_len // options.sp * config.hidden_size * 2
        host = hidden * (config.num_hidden_layers + 1) / GIB
        print(f"{host:8.1f} GiB  of host memory for each GPU: the blocks' inputs")


def count_parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPTOSS(config).parameters())


def needs_of(options, config, parameters, ranks):
    """`estimate` of a run with these options."""
    shared = "sp replicas seq_len micro_batch optimizer recompute keep_blocks offload"
    settings = {name: getattr(options, name) for name in shared.split()}
    micro_batches = options.batch_size * options.sp // (ranks * options.micro_batch)
    return estimate(
        config, parameters=parameters, ranks=ranks, micro_batches=micro_batches, **settings
    )
