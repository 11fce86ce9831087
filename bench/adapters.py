"""Training steps of low-rank adapters on the 20b with its experts packed in MXFP4, on one GPU.

    python -m bench --adapters                  # all rows
    python -m bench --adapters --rows=16K,64K   # those of these lengths
    python -m bench --adapters=whole            # and the longest ones through all layers

A step is forward, backward and optimizer. Rows with a limit may use no more of the GPU than a 24 GB
card has, 23.5 GiB. A row of fewer layers keeps all weights in memory and runs through some of the
blocks: for its peak, because with the blocks' inputs in host memory the others add nothing."""

import math
import time
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import nn

import fast
import flash
import lora
from bench.common import DEVICE, DTYPE, GIB, GPU, K, attempt, random_tokens, synchronize
from bench.report import length, say, say_row
from bench.speed import measure_steps
from frozen import pack
from loop import memory
from loop.memory import HostMemory, SplitAdamW
from model import GPTOSS

CARD = 23.5  # GiB that a process can have of a 24 GB card
BOTH = "attention,experts"
TARGETS = [  # tokens, adapters, settings of the step, what to reach: GiB at most, tok/s at least
    (4 * K, "attention", {"limit": CARD}, (16, None)),
    (16 * K, "attention", {"limit": CARD}, (18.5, 12500)),
    (64 * K, "attention", {"limit": CARD, "offload": True}, (20, 8700)),
    (128 * K, "attention", {"limit": CARD, "offload": True, "layers": 4}, (22.5, None)),
    (16 * K, BOTH, {"limit": CARD}, (None, None)),
    (32 * K, BOTH, {"recompute": "attention", "keep_blocks": 8}, (None, 12000)),
    (512 * K, BOTH, {"offload": True, "layers": 2}, (64, None)),
    (640 * K, BOTH, {"offload": True, "layers": 2}, (None, None)),
    (750 * K, BOTH, {"offload": True, "layers": 2}, (None, None)),
    # minutes long
    (128 * K, "attention", {"limit": CARD, "offload": True, "whole": True}, (22.5, None)),
    (512 * K, BOTH, {"offload": True, "whole": True}, (64, None)),
    (640 * K, BOTH, {"offload": True, "whole": True}, (None, None)),
    (750 * K, BOTH, {"offload": True, "layers": 12, "whole": True}, (None, None)),
]
COLUMNS = [
    ("tokens", "row", "<8"),
    ("adapters", "targets", "<20"),
    ("recompute", "recompute", ">10"),
    ("kept blocks", "keep_blocks", ">12"),
    ("offload", "offload", ">8"),
    ("layers", "layers", ">7"),
    ("limit", "limit", ">6"),
    ("tile", "tile", ">7"),
    ("tok/s", "tokens_per_second", ">10,.0f"),
    ("at least", "least", ">9"),
    ("peak GiB", "peak_gib", ">10.2f"),
    ("at most", "most", ">8"),
    ("reserved", "reserved_gib", ">9.1f"),
    ("step s", "seconds", ">9.3f"),
    ("compile s", "compile_seconds", ">10.1f"),
    ("loss", "loss", ">8.3f"),
]


@torch.no_grad()
def build_packed(config):
    """The model with random packed experts, whose values are about as large as the others."""
    with torch.device("meta"):
        model = GPTOSS(config)
    model = pack(model.to(DTYPE)).to_empty(device=DEVICE).requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("_scales"):
            p.random_(117, 121)
        elif name.endswith("_blocks"):
            p.random_(256)
        elif name.endswith("norm.weight"):
            p.fill_(1)
        elif name.endswith(("bias", "sinks")):
            p.zero_()
        else:
            p.normal_(0, 0.02)
    return model


def attach(model, targets):
    """Put adapters on those of the targets that have none, and start all of them anew. Returns an
    optimizer."""
    there = {name.rpartition("lora_")[0] for name in lora.adapters(model)}
    for target, rank in ("attention", 16), ("experts", 8):
        module = {"attention": ".qkv.", "experts": ".down_"}[target]
        if target in targets and not any(name.endswith(module) for name in there):
            lora.adapt(model, rank, 2.0 * rank, target)
            model.requires_grad_(False)
    lora.init_adapters(model)
    for p in lora.adapters(model).values():
        p.requires_grad_(True)
    return SplitAdamW(lora.adapters(model).values(), lr=1e-4)


def step(model, optimizer, tokens, offload):
    """(seconds, loss) of one training step. ValueError if the loss is not finite."""
    synchronize()
    began = time.perf_counter()
    with HostMemory() if offload else nullcontext():
        loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    elapsed = time.perf_counter() - began
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss is {loss.item()}")
    return elapsed, loss.item()


def measure(model, optimizer, S, settings):
    """What to add to a row."""
    model.recompute, model.keep_blocks = settings["recompute"], settings["keep_blocks"]
    blocks, losses = model.blocks, []
    total = torch.cuda.get_device_properties(DEVICE).total_memory / GIB if GPU else math.inf
    fast.fit_tiles(settings["limit"] or total)
    memory.AHEAD = memory.ahead(settings["limit"] or total)
    lora.embed_on_host(model)
    if not settings["offload"]:
        model.embedding.to(DEVICE)
    if GPU:
        torch.cuda.set_per_process_memory_fraction((settings["limit"] or total) / total)
        flash.cudnn_refuses(DEVICE, DTYPE, model.config.head_dim)
    tokens = random_tokens(model.config, S)

    def run():
        elapsed, loss = step(model, optimizer, tokens, settings["offload"])
        losses.append(loss)
        return elapsed

    try:
        model.blocks = nn.ModuleList(blocks[: settings["layers"]])
        if settings["layers"] == model.config.num_hidden_layers and S < 512 * K:
            found = measure_steps(model.config, S, S, run)
        else:  # one step, compilation in it
            torch._dynamo.reset()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            elapsed = run()
            peak = torch.cuda.max_memory_allocated() / GIB if GPU else None
            found = {"seconds": elapsed, "tokens_per_second": S / elapsed, "peak_gib": peak}
        reserved = torch.cuda.max_memory_reserved() / GIB if GPU else None
        return found | {"reserved_gib": reserved, "loss": losses[-1], "tile": fast.EXPERT_TOKENS}
    finally:
        model.blocks = blocks
        optimizer.zero_grad()
        if GPU:
            torch.cuda.set_per_process_memory_fraction(1.0)
        fast.fit_tiles(math.inf)


def section(options, config, results):
    """Prints every row beside what it has to reach. Sizes of a CPU's tiny rows mean nothing."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    say("\nTraining steps of adapters: rank 16 on attention, 8 on experts; experts in MXFP4")
    config = replace(config, max_position_embeddings=1024 * K)
    model = build_packed(config)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / GIB
    say(f"frozen weights {weights:.2f} GiB")
    results.save(weights_gib=weights)
    say_row(COLUMNS)
    targets, optimizer, whole = None, None, options.adapters == "whole"
    for tokens, wanted, settings, (most, least) in TARGETS:
        S = tokens if GPU else tokens // K
        if (options.rows and S not in options.rows) or ("whole" in settings) > whole:
            continue
        if wanted != targets:
            targets, optimizer = wanted, attach(model, wanted)
        defaults = {"recompute": "all", "keep_blocks": 0, "offload": False, "limit": None}
        settings = defaults | {"layers": config.num_hidden_layers} | settings
        settings["offload"] &= GPU
        row = {"row": length(S), "tokens": S, "targets": wanted, "most": most, "least": least}
        row |= settings | attempt(measure, model, optimizer, S, settings)
        results.add("rows", row)
        say_row(COLUMNS, row)
