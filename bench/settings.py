"""The settings of a training row: how its sequences are divided, and what is recomputed."""

import torch

from bench.common import DEVICE, GIB, GPU
from loop import plan


def ranks_per_sequence(options, ranks, sequences):
    """--sp, or as many ranks as there are for each sequence."""
    return max(1, ranks // sequences) if options.sp is None else options.sp


def card(options):
    """GiB that a row may use of this GPU: all, or --gpu_gib. Without a GPU --gpu_gib, or 80."""
    if not GPU:
        return options.gpu_gib or 80
    there = torch.cuda.get_device_properties(DEVICE).total_memory / GIB
    return min(options.gpu_gib or there, there)


def fitting(options, config, settings, optimizers):
    """{optimizer, recompute, keep_blocks, offload}: the fastest that fit settings["gpu_gib"] by the
    dry run's arithmetic, or if none do, those that need least. What the command line says stays,
    whether it fits or not."""
    given = {"optimizer": options.optimizer, "keep_blocks": options.keep_blocks}
    given["recompute"] = None if options.recompute == "auto" else options.recompute
    given = {name: value for name, value in given.items() if value is not None}
    usual = {"recompute": "attention", "keep_blocks": 0, "offload": False}
    choices = [
        choice
        for optimizer in optimizers
        for recomputation in plan.recomputations(config.num_hidden_layers)
        if given.items() <= (choice := recomputation | {"optimizer": optimizer}).items()
        and (GPU or not choice["offload"])
    ] or [usual | {"optimizer": optimizers[0]} | given]
    usable = plan.room(settings["gpu_gib"], settings["ranks"])
    best = plan.fastest(config, settings, usable, choices)
    best = best or min(choices, key=lambda choice: plan.peak(config, settings | choice))
    return {name: best[name] for name in ("optimizer", "recompute", "keep_blocks", "offload")}
