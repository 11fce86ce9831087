"""The arithmetic of low-rank adapters on frozen weights: what a rank holds, for the dry run."""

import math

import torch

import lora
from fast import tile_sizes
from flash import head_groups
from loop import memory
from loop.budget import BYTES, LOSS_TOKENS
from model import GPTOSS

# Seconds per weight of the experts to unpack them for a forward and a backward: what three steps
# on an H100, of 4K to 64K tokens, took beyond plan.seconds' estimate of matmuls and attention.
WRITE = 0.08 / 19.1e9


def facts(options, config, gpu_gib):
    """What `estimate` needs to know of a run's adapters, on GPUs of `gpu_gib` GiB (0: large);
    None if every weight is trained. ValueError for adapters that the model cannot have."""
    if not options.lora_rank:
        return None
    with torch.device("meta"):
        model = GPTOSS(config).bfloat16()
    lora.adapt_as(options, model, None)
    frozen, names = lora.base(model).values(), lora.adapters(model)
    ends = [name for name in names if not lora.is_adapter(name)]
    on_experts = any(name.endswith(("gate_up_lora_a", "down_lora_a")) for name in names)
    written = config.num_experts * config.hidden_size * config.intermediate_size
    written *= options.frozen == "mxfp4" or on_experts
    tile, workspace = tile_sizes(gpu_gib or math.inf)
    return {
        "ends": ends,  # embedding and unembedding, if they are trained themselves
        "trained": sum(p.numel() for p in lora.adapters(model).values()),
        "frozen": sum(p.numel() * p.element_size() for p in frozen),
        "written": written > 0,  # experts, anew each time a block runs
        "seconds": WRITE * 3 * written * config.num_hidden_layers,  # of a micro-batch
        "shared": options.shard_frozen,
        "tile": tile,
        "workspace": workspace,
        "ahead": memory.ahead(gpu_gib or math.inf),
    }


def estimate(
    config,
    *,
    adapters,
    ranks,
    sp,
    seq_len,
    micro_batch,
    optimizer,
    recompute,
    offload,
    keep_blocks=0,
    **_,
):
    """As budget.estimate, of a run of adapters. Within 1.1 % of six peaks measured on an H100, of
    4K to 128K tokens (docs/benchmarks.md)."""
    C, F, k = config.hidden_size, config.intermediate_size, config.experts_per_token
    E, V, L = config.num_experts, config.vocab_size, config.num_hidden_layers
    heads = config.num_attention_heads * config.head_dim
    qkv = heads + 2 * max(config.num_key_value_heads, sp) * config.head_dim
    tokens, embedding = micro_batch * seq_len // sp, 2 * V * C
    ends = adapters["ends"]
    frozen_embedding = "embedding.weight" not in ends
    on_host = embedding if offload and not adapters["shared"] and frozen_embedding else 0
    held, gathered = adapters["frozen"] - on_host, 0
    if adapters["shared"]:  # in whole: this block, the next one, and the ends
        of_ends = (2 - len(ends)) * embedding
        gathered = 2 * (adapters["frozen"] - of_ends) // L + of_ends
        held //= ranks
    trained = sum(BYTES[optimizer]) * adapters["trained"] // ranks
    gathered += 2 * (adapters["trained"] - len(ends) * V * C) // L * 2
    gathered += 2 * len(ends) * embedding  # with their gradients

    given, gates = 2 * tokens * C, 2 * tokens * k * 2 * F
    whole = L if recompute == "none" else min(keep_blocks, L)  # blocks that recompute nothing

    def inside(i):  # see budget.estimate; windows' attention keeps out with and without its sinks
        outs = heads if sp == 1 and not config.window(i) else 2 * heads
        return 2 * tokens * (3 * C + qkv + outs)

    stored = tokens * (2 * heads + 4 * config.num_attention_heads)
    stored = [stored * (recompute == "attention" and not config.window(i)) for i in range(L)]
    kept = [
        given + inside(i) + gates if i >= L - whole else given * (not offload) + stored[i]
        for i in range(L)
    ]

    tiled, choices = tokens > adapters["tile"], k * min(tokens, adapters["tile"])
    experts = 2 * choices * ((3 + tiled) * C + 6 * F)
    if adapters["written"]:  # with one tile one matrix at a time
        experts += 2 * E * C * F * (3 if tiled else 2)
    fetched = given * offload * (1 + (given <= adapters["ahead"]))

    def attention(i):
        """Beside `inside`, of which x after attention and its norm are gone by then: the gradients
        of q, k, v and out, and what cuDNN works in (see flash.head_groups)."""
        results = 2 * tokens * (qkv + heads) - 2 * given
        if config.window(i):
            return results
        kv_heads = max(config.num_key_value_heads, sp) // sp
        groups = head_groups(tokens * heads, kv_heads, adapters["workspace"])
        return results + (8 * tokens * heads + 2 * tokens * qkv * (groups > 1)) // groups

    def backward(i):
        whole_block = i >= L - whole
        of_experts = experts + 2 * given - (2 * choices * 2 * F if whole_block else 0)
        of_attention = attention(i) + given - (gates if whole_block else 0)
        replayed = 0 if whole_block else inside(i) - stored[i]
        return sum(kept[: i + 1]), replayed + max(of_experts, of_attention) + fetched

    summed = 4 * V * C * ("unembedding.weight" in ends)  # its gradient, in fp32
    at_loss = sum(kept), LOSS_TOKENS * V * 2 + 2 * given + summed
    activations, working = max((at_loss, *map(backward, range(L))), key=sum)
    return {
        "frozen weights": held,
        "adapters, their gradients, optimizer": trained,
        "gathered by FSDP": gathered,
        "kept activations": activations,
        "working set": working,
    }
