"""The arithmetic of a run: FLOPs of the model, bytes on a GPU, bytes between GPUs. plan.py prints
it.

FLOPs are model FLOPs unless said otherwise: nothing recomputed, active experts only, and only the
keys that a query may see (Chowdhery et al., https://arxiv.org/abs/2204.02311)."""

import math
from itertools import accumulate

import torch

from fast import LOSS_TOKENS, tile_sizes
from flash import OF_DOCUMENTS, head_groups
from loop.memory import ahead
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

# With replicas FSDP copies gradients from fp32 to bf16, into the memory of its own stream (see
# memory.ReduceScatter), which the computation cannot use; with a few GiB more, in six measured runs
# of the 20b on eight ranks about a block's gradients in bf16 and fp32, it is reserved and unused.
RESERVED = "reserved by FSDP's streams"


def adds_in_bf16(ranks, optimizer):
    """True if gradients are summed over the ranks in bf16 rather than fp32: with two ranks the sum
    is rounded to bf16 once either way, and half as much is sent."""
    return ranks <= 2 and optimizer != "fp32"


def sent_size(ranks, replicas, optimizer):
    """Bytes of a gradient as it is sent. With replicas FSDP adds up what is kept in bf16 itself,
    and sends fp32."""
    in_bf16 = adds_in_bf16(ranks, optimizer) or receives_bf16(ranks, replicas, optimizer)
    return 2 if in_bf16 else 4


def receives_bf16(ranks, replicas, optimizer):
    """True if memory.ReduceScatter exchanges gradients in bf16 and adds them up in fp32."""
    return optimizer != "fp32" and replicas == 1 and not adds_in_bf16(ranks, optimizer)


def widths(config, sp):
    """Numbers per token in attention's output, and in q, k and v as the ranks exchange them."""
    heads, kv_heads = config.num_attention_heads, max(config.num_key_value_heads, sp)
    return heads * config.head_dim, (heads + 2 * kv_heads) * config.head_dim


def activations(
    config, experts, *, sp, seq_len, micro_batch, recompute, offload, keep_blocks=0, gpu_gib=0
):
    """[(bytes kept for the backward, bytes worked in)] of one rank, while each block runs its
    backward, from the first to the last, and then in the loss.

    experts(choices, tiled): bytes that the experts' backward works in, for `choices` pairs of a
    token and an expert at a time: all there are, or a tile's. gpu_gib: GiB of the GPU, by which
    tiles are cut (fast.tile_sizes); 0: large."""
    C, F, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    L, (heads, qkv) = config.num_hidden_layers, widths(config, sp)
    tile, workspace = tile_sizes(gpu_gib or math.inf)
    tokens = micro_batch * seq_len // sp
    tiled, choices = tokens > tile, k * min(tokens, tile)
    given, gates = 2 * tokens * C, 2 * tokens * k * 2 * F  # a block's input; gates and ups
    first_whole = 0 if recompute == "none" else L - keep_blocks  # of those that recompute nothing
    # on their way back from the host
    fetched = given * offload * (1 + (given <= ahead(gpu_gib or math.inf)))
    # FlexAttention's mask lists pairs of 128 x 128 tokens, each in four int32: at 1M tokens a GiB
    mask = 16 * math.ceil(seq_len / 128) ** 2

    def outs(i):  # FlexAttention's sinks and the all-to-all make a second output of attention
        return 2 if sp > 1 or config.window(i) else 1

    def inside(i):  # x after attention and both norms; q, k, v; attention's output
        return 2 * tokens * (3 * C + qkv + outs(i) * heads)

    def stored(i):  # by "attention", of full layers: the output, and its logsumexp in fp32
        sizes = tokens * (2 * heads + 4 * config.num_attention_heads)
        return sizes if recompute == "attention" and not config.window(i) else 0

    def kept(i):
        whole = given + inside(i) + gates
        return whole if i >= first_whole else given * (not offload) + stored(i)

    def attention(i):
        """Gradients of q, k, v and the output, and what the kernels work in, for packed documents,
        which need more (flash.in_head_groups). Gone by then: x after attention and its norm, and
        the second output."""
        results = 2 * tokens * (qkv + (2 - outs(i)) * heads) - given
        if config.window(i):
            return results
        kv_heads = max(config.num_key_value_heads, sp) // sp
        working = OF_DOCUMENTS * tokens * heads
        groups = head_groups(working, kv_heads, workspace)
        return results + (working + 2 * tokens * qkv * (groups > 1)) // groups

    def backward(i):  # of the experts, with the gradients of their input and output; then attention
        of_experts = experts(choices, tiled) + 2 * given
        if i >= first_whole:
            return max(of_experts - 2 * choices * 2 * F, attention(i) - gates)
        return inside(i) - stored(i) + max(of_experts, attention(i)) + fetched

    sums = list(accumulate(map(kept, range(L))))
    in_loss = sums[-1], 2 * LOSS_TOKENS * config.vocab_size + 2 * given + mask
    return [*((sums[i], backward(i) + mask) for i in range(L)), in_loss]


def estimate(
    config, *, parameters, ranks, replicas, optimizer, micro_batches=1, states=None, **run
):
    """Memory of one rank in training, for a computation in bf16: {what for: bytes}, which add up to
    the peak. Counted by hand from model.py, fast.py and FSDP2. run: what `activations` asks for.
    states: {optimizer: bytes per parameter of its state}, where it is not AdamW's.

    The peak is in the loss or in the backward of a block. From the last block to the first, the
    backward frees what the forward kept and makes gradients; in later micro-batches of a step all
    gradients are there from the start."""
    C, F = config.hidden_size, config.intermediate_size
    V, L = config.vocab_size, config.num_hidden_layers
    block, ends = (parameters - 2 * V * C - C) // L, 2 * V * C  # ends: embedding, unembedding
    sizes = (*BYTES[optimizer][:2], (states or {}).get(optimizer, BYTES[optimizer][2]))
    weight, gradient, moments = (size * parameters * replicas // ranks for size in sizes)
    sent = sent_size(ranks, replicas, optimizer)
    copied = optimizer != "fp32" and sent == 4  # by FSDP, from the sums in fp32
    exchanged = sent * (2 if receives_bf16(ranks, replicas, optimizer) else 1)
    held = 0
    if replicas > 1 and (copied or micro_batches > 1):
        # the sums of all blocks, until the replicas have added theirs
        held = sent * parameters * replicas // ranks

    def experts(choices, tiled):
        """x, its gradient, gates and ups, their gradients and so on. Of several tiles, one's last
        tensors overlap with the next one's, and gradients of weights are summed in fp32."""
        return 2 * choices * ((3 + tiled) * C + 6 * F) + 4 * block * tiled

    *in_blocks, in_loss = activations(config, experts, **run)

    def needs(gradients, gathered, kept, working):
        unused = {RESERVED: gradient - gradients + 6 * block} if copied else {}
        return {
            "weights": weight,
            "optimizer": moments,
            "gradients, kept activations": gradients + kept,
            "gathered by FSDP": gathered + held,
            "working set": working,
            **unused,
        }

    def backward(i):
        # in bf16 this block, the next one, and the unembedding; this block's gradients; those of
        # the block before, as they are sent and received; the unembedding's
        gathered = 2 * (2 * block if i else block) + ends + 2 * block
        gathered += exchanged * block * (i < L - 1) + ends
        return needs(made(i), gathered, *in_blocks[i])

    def made(i):  # gradients, before the backward of block i
        return gradient if micro_batches > 1 else gradient * (L - 1 - i) * block // parameters

    kept, working = in_loss
    at_loss = needs(made(L - 1), 2 * block + ends, kept, working + V * C * (4 + 2))
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
    sent = sent_size(ranks, replicas, optimizer)
    # weights are gathered for the forward and again for the backward, but once those of the last
    # block and the unembedding, which stay, and the embedding's, which the backward does without
    gathered = 2 * ((parameters - ends) * (2 * L - 1) // L + ends)
    if adapters:  # `parameters` are theirs, and frozen weights are gathered only if they are shared
        trained = len(adapters["ends"]) * config.vocab_size * config.hidden_size
        gathered = 2 * ((parameters - trained) * (2 * L - 1) // L + trained)
        in_blocks = adapters["frozen"] - 2 * (ends - trained)
        gathered += adapters["shared"] * (in_blocks * (2 * L - 1) // L + 2 * (ends - trained))
    # all-to-all: q, k, v and out, in the forward, its replay and the backward
    heads, qkv = widths(config, sp)
    replayed = 0 if recompute == "none" else max(L - keep_blocks, 0)
    tokens = micro_batch * seq_len // sp
    exchanged = 2 * tokens * (2 * L + replayed) * (qkv + heads)
    per_micro_batch = {
        "all_gather": gathered * (shards - 1) // shards,
        "reduce_scatter": sent * parameters * (shards - 1) // shards,
        "all_to_all": exchanged * (sp - 1) // sp,
        "all_reduce": 2 * sent * parameters // shards * (replicas - 1) // replicas,
    }
    return {kind: micro_batches * size for kind, size in per_micro_batch.items()}
