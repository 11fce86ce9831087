"""The arithmetic of low-rank adapters on frozen weights: what a rank holds, for the dry run."""

import torch

import lora
from loop.budget import BYTES, activations
from model import GPTOSS

# Seconds per weight of the experts to unpack them for a forward and a backward: what three steps
# on an H100, of 4K to 64K tokens, took beyond plan.seconds' estimate of matmuls and attention.
WRITE = 0.08 / 19.1e9


def facts(options, config):
    """What `estimate` needs to know of a run's adapters. ValueError for adapters that the model
    cannot have."""
    with torch.device("meta"):
        model = GPTOSS(config).bfloat16()
    lora.adapt_as(options, model, None)
    frozen, names = lora.base(model).values(), lora.adapters(model)
    ends = [name for name in names if not lora.is_adapter(name)]
    on_experts = any(name.endswith(("gate_up_lora_a", "down_lora_a")) for name in names)
    written = config.num_experts * config.hidden_size * config.intermediate_size
    written *= options.frozen == "mxfp4" or on_experts
    return {
        "ends": ends,  # embedding and unembedding, if they are trained themselves
        "trained": sum(p.numel() for p in lora.adapters(model).values()),
        "frozen": sum(p.numel() * p.element_size() for p in frozen),
        "written": written > 0,  # experts, anew each time a block runs
        "seconds": WRITE * 3 * written * config.num_hidden_layers,  # of a micro-batch
        "shared": options.shard_frozen,
    }


def estimate(config, *, adapters, ranks, optimizer, parameters, replicas, micro_batches, **run):
    """As budget.estimate, of a run of adapters."""
    C, F = config.hidden_size, config.intermediate_size
    E, V, L = config.num_experts, config.vocab_size, config.num_hidden_layers
    embedding, ends = 2 * V * C, adapters["ends"]
    frozen_embedding = "embedding.weight" not in ends
    on_host = embedding if run["offload"] and not adapters["shared"] and frozen_embedding else 0
    held, gathered = adapters["frozen"] - on_host, 0
    if adapters["shared"]:  # in whole: this block, the next one, and the ends
        of_ends = (2 - len(ends)) * embedding
        gathered = 2 * (adapters["frozen"] - of_ends) // L + of_ends
        held //= ranks
    trained = sum(BYTES[optimizer]) * adapters["trained"] // ranks
    gathered += 2 * (adapters["trained"] - len(ends) * V * C) // L * 2
    gathered += 2 * len(ends) * embedding  # with their gradients

    def experts(choices, tiled):
        """As in budget.estimate, but without gradients of the weights; and where frozen.py runs, in
        its order: what a tile drops early is gone, what the one before still holds is there. With
        the unpacked matrices: one at a time, or for several tiles both."""
        if not adapters["written"]:
            return 2 * choices * ((3 + tiled) * C + 6 * F)
        unpacked = 2 * E * C * F * (3 if tiled else 2)
        return 2 * choices * ((2 + tiled) * C + (6 + 2 * tiled) * F) + unpacked

    *in_blocks, (kept, working) = activations(config, experts, **run)
    summed = 4 * V * C * ("unembedding.weight" in ends)  # its gradient, in fp32
    kept, working = max(*in_blocks, (kept, working + summed), key=sum)
    return {
        "frozen weights": held,
        "adapters, their gradients, optimizer": trained,
        "gathered by FSDP": gathered,
        "kept activations": kept,
        "working set": working,
    }
