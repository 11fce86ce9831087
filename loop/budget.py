"""The arithmetic of a run: FLOPs of the model, bytes on a GPU, and the dry run that prints them."""

import os

import torch

from fast import EXPERT_TOKENS, LOSS_TOKENS
from loop.options import check_ranks, model_config
from model import GPTOSS

# --------------------------------------------------------------------------------------------------

# FLOPs


def keys(config, layer, seq_len):
    """Keys that the average query of this layer sees in a sequence of `seq_len`."""
    w = min(config.window(layer) or seq_len, seq_len)
    return w - w * (w - 1) / 2 / seq_len  # the first w queries see 1 … w keys, the others w


def block_matrices(config):
    """{name: weights} of the matrices that a token meets in a block."""
    C, D, K = config.hidden_size, config.head_dim, config.num_key_value_heads
    heads = config.num_attention_heads * D
    experts = config.experts_per_token * C * config.intermediate_size
    return {
        "qkv": C * (heads + 2 * K * D),
        "out": heads * C,
        "router": C * config.num_experts,
        "gate_up": 2 * experts,
        "down": experts,
    }


def flops_per_token(config, seq_len):
    """FLOPs that training spends on one token of a sequence of `seq_len`: forward and backward, nothing recomputed,
    active experts only, and only the keys that attention may see (Chowdhery et al., https://arxiv.org/abs/2204.02311)."""
    layers = range(config.num_hidden_layers)
    matrices = (
        len(layers) * sum(block_matrices(config).values()) + config.hidden_size * config.vocab_size
    )
    heads = config.num_attention_heads * config.head_dim
    seen = sum(keys(config, layer, seq_len) for layer in layers)
    return (
        6 * matrices + 3 * 4 * heads * seen
    )  # a matrix: 2 forward, 4 backward; a key: scores and values


def recomputed_flops(config, seq_len, recompute, keep_blocks):
    """FLOPs that the backward spends on a token to make again what the forward did not keep, beside config.flops_per_token."""
    layers = range(0 if recompute == "none" else max(config.num_hidden_layers - keep_blocks, 0))
    matrices = block_matrices(config)
    block = (
        sum(matrices.values()) - matrices["down"]
    )  # nothing in the backward reads what the experts' down matrices returned
    heads = config.num_attention_heads * config.head_dim
    again = [layer for layer in layers if recompute == "all" or config.window(layer) is not None]
    return 2 * block * len(layers) + 4 * heads * sum(
        keys(config, layer, seq_len) for layer in again
    )


PEAK = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}  # dense bf16 FLOP/s, from NVIDIA's data sheets


def flops_of(config, documents):
    """FLOPs of training on rows (B, S) of documents: attention stays inside each. See GPTOSSConfig.flops_per_token."""
    lengths = [
        n for row in documents for n in row.unique_consecutive(return_counts=True)[1].tolist()
    ]
    return sum(n * flops_per_token(config, n) for n in lengths)


def peak_flops(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for gpu, flops in PEAK.items() if gpu in name), None)


# --------------------------------------------------------------------------------------------------

# Bytes

BYTES = {
    "fp32": (4, 4, 8),
    "split": (2, 2, 6),
    "bf16": (2, 2, 4),
}  # of a parameter: weight, gradient, optimizer


def adds_in_bf16(ranks, optimizer):
    """Whether the ranks' gradients are added in bf16, not fp32: of two numbers, kept in bf16, the sum is rounded once either
    way, and half as much is sent."""
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
    """Memory that one rank needs in training: {what for: bytes}, which add up to the peak. Counted by hand from model.py, for a
    computation in bf16.

    The backward frees what the forward kept, block by block, as it makes the gradients. The blocks that keep most are the last,
    and freed first, so in a step's first micro-batch only the larger of the two counts; in later ones the gradients are
    there already. Both count where gradients are added in fp32 and kept in bf16, because FSDP makes that copy in memory of its
    own stream, as ReduceScatter explains: there the allocator needs more than it hands out."""
    C, F, V, L = (
        config.hidden_size,
        config.intermediate_size,
        config.vocab_size,
        config.num_hidden_layers,
    )
    heads, kv = (
        config.num_attention_heads * config.head_dim,
        max(config.num_key_value_heads, sp) * config.head_dim,
    )
    tokens = micro_batch * seq_len // sp
    block = (parameters - 2 * V * C - C) // L
    weight, gradient, moments = (size * parameters * replicas // ranks for size in BYTES[optimizer])
    # two blocks and the embeddings whole in bf16; a block's gradients whole in bf16, and once more as they are added up
    gathered = (
        2 * (2 * block + 2 * V * C) + (2 + (2 if adds_in_bf16(ranks, optimizer) else 4)) * block
    )
    copied = optimizer != "fp32" and not adds_in_bf16(
        ranks, optimizer
    )  # gradients, to the dtype they are kept in
    if replicas > 1 and (
        copied or micro_batches > 1
    ):  # sums of all blocks, held until the replicas have added them
        gathered += (2 if adds_in_bf16(ranks, optimizer) else 4) * parameters * replicas // ranks
    k = config.experts_per_token
    whole = L if recompute == "none" else min(keep_blocks, L)  # blocks of which everything is kept
    # x before and after both norms; q, k, v; attention's out, a second one after FlexAttention's sinks or the all-to-all, so on
    # half of the layers or on all; gates and ups
    outs = 2 * heads if sp > 1 else 3 * heads // 2
    kept = 2 * tokens * whole * (4 * C + (heads + 2 * kv) + outs + k * 2 * F)
    kept += 2 * tokens * C * min(L - whole, 2 if offload else L)
    if (
        recompute == "attention"
    ):  # out, and its logsumexp in fp32, of the layers that see everything
        kept += tokens * (2 * heads + 4 * config.num_attention_heads) * ((L - whole) // 2)
    # the largest of attention's backward, a tile of experts and the loss, beside the residual stream and its gradient
    attention = 2 * tokens * (4 * (heads + 2 * kv) + 3 * heads)
    tiled = tokens > EXPERT_TOKENS  # then the weights' gradients are added up in fp32
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
    """What a step is made of, in words. Its FLOPs are an upper bound: rows of several documents have less attention."""
    groups, tokens = ranks // options.sp, options.batch_size * options.seq_len
    flops = flops_per_token(config, options.seq_len)
    again = (
        recomputed_flops(config, options.seq_len, options.recompute, options.keep_blocks) / flops
    )
    return (
        f"{parameters:,} parameters, optimizer {options.optimizer} at {sum(BYTES[options.optimizer])} bytes each\n"
        f"{tokens:,} tokens a step = {options.batch_size // groups // options.micro_batch} micro-batches x {groups} groups of "
        f"sp {options.sp} x {options.micro_batch} rows x {options.seq_len:,} tokens; "
        f"{flops * tokens:.3g} FLOPs{f', and {again:.0%} more for what is recomputed' if again else ''}, "
        "if each row is one document"
    )


def dry_run(options):
    """Print what the run will need."""
    ranks, config = int(os.environ.get("WORLD_SIZE", options.ranks)), model_config(options)
    check_ranks(options, config, ranks)
    if os.environ.get("RANK", "0") != "0":
        return
    with torch.device("meta"):
        parameters = sum(p.numel() for p in GPTOSS(config).parameters())
    shared = (
        "sp",
        "replicas",
        "seq_len",
        "micro_batch",
        "optimizer",
        "recompute",
        "keep_blocks",
        "offload",
    )
    micro_batches = options.batch_size * options.sp // (ranks * options.micro_batch)
    settings = {name: getattr(options, name) for name in shared}
    needs = estimate(
        config, parameters=parameters, ranks=ranks, micro_batches=micro_batches, **settings
    )
    print(arithmetic(options, config, parameters, ranks))
    for what, size in needs.items():
        print(f"{size / 2**30:8.1f} GiB  {what}")
    print(
        f"{sum(needs.values()) / 2**30:8.1f} GiB  peak of each of {ranks} GPUs, without what CUDA and NCCL take"
    )
    if options.offload:  # the last block's output goes there, too
        hidden = options.micro_batch * options.seq_len // options.sp * config.hidden_size * 2
        print(
            f"{hidden * (config.num_hidden_layers + 1) / 2**30:8.1f} GiB  of host memory for each GPU: the blocks' inputs"
        )
