"""What a run will need, whether that fits, and which settings would be the fastest that fit: the
dry run."""

import os
from contextlib import suppress
from dataclasses import replace

import torch

from loop import adapters
from loop.budget import (
    BYTES,
    GIB,
    RECOMPUTED,
    count_parameters,
    estimate,
    flops_per_token,
    forward_flops,
    matrices,
    recomputed_flops,
    sent_bytes,
)
from loop.options import check_ranks, model_config
from loop.states import fill_state
from model import GPTOSS

SETTINGS = "sp", "replicas", "seq_len", "micro_batch"
SETTINGS += "optimizer", "recompute", "keep_blocks", "offload"
# What a plan may use of a GPU's memory: CUDA and NCCL take some, the allocator holds more than the
# peak, and arithmetic errs. On four H100s of 79.2 GiB runs took 3.9 to 4.5 more than their plan.
SHARE, NCCL = 0.93, GIB // 2


def settings_of(options, config, ranks):
    """What `estimate` and `sent_bytes` ask for, of a run with these options."""
    micro_batches = options.batch_size * options.sp // (ranks * options.micro_batch)
    settings = {name: getattr(options, name) for name in SETTINGS} | {"gpu_gib": card(options)}
    if options.lora_rank:
        settings["adapters"] = adapters.facts(options, config)
    trained = settings["adapters"]["trained"] if options.lora_rank else count_parameters(config)
    return {"parameters": trained, "ranks": ranks, "micro_batches": micro_batches, **settings}


def card(options):
    """GiB of the GPUs of a run; 0 if nobody knows."""
    if not options.gpu_gib and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return options.gpu_gib


def room(gib, ranks):
    """Bytes that a plan for `ranks` GPUs of `gib` GiB may use of each."""
    return SHARE * gib * GIB - NCCL * (ranks > 1)


def needs(config, settings):
    """{what for: bytes} of a rank."""
    return (adapters.estimate if "adapters" in settings else estimate)(config, **settings)


def peak(config, settings):
    """Bytes that decide whether a run fits."""
    return sum(needs(config, settings).values())


def state_bytes(build_optimizer, options, config):
    """Bytes that the optimizer of train.py keeps per parameter: those that it keeps for each of a
    small model's parameters, weighted by the real ones' sizes."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "head_dim"), 8)
    counts = "num_attention_heads", "num_key_value_heads", "num_experts", "experts_per_token"
    model = GPTOSS(replace(config, **sizes, **dict.fromkeys(counts, 1)))
    model = model.to(torch.float32 if options.optimizer == "fp32" else torch.bfloat16)
    fill_state(optimizer := build_optimizer(options, model))
    with torch.device("meta"):
        real = {name: p.numel() for name, p in GPTOSS(config).named_parameters()}
    total = 0
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {}).items()
        kept = sum(x.nbytes for key, x in state if torch.is_tensor(x) and key != "step")
        total += kept / p.numel() * real[name]
    return total / sum(real.values())


# --------------------------------------------------------------------------------------------------
# Time

# FLOP/s of matmuls and of attention as parts of a step on an H100, and seconds of a micro-batch per
# parameter that do not depend on its tokens: fitted to eight rehearsed runs of the 20b as one of
# eight (4K to 1M tokens, docs/LOG.md, 2026-11-26), which they repeat within 2 %, and later runs on
# other H100s within 3 %. One H100 is up to 5 % slower than another.
MATMUL, ATTENTION, PER_PARAMETER = 522e12, 404e12, 0.23 / 20.9e9
WINDOW = 5  # how much slower than full attention's FLOPs those of windows are


def seconds(config, settings, gbps=350):
    """Estimated seconds of a step on H100s that send `gbps` GB/s each: FSDP communicates while the
    GPU computes, the all-to-alls of sequence parallelism do not."""
    seq_len, L = settings["seq_len"], config.num_hidden_layers
    forward = forward_flops(config, seq_len)
    replayed = forward_flops(config, seq_len, range(max(L - settings["keep_blocks"], 0)))
    of_matrices, time = matrices(config), 0
    for name, flops in forward.items():
        # the backward of a matmul is two, or for a frozen matrix one, attention's two and a half
        flops *= (2 if "adapters" in settings else 3) if name in of_matrices else 3.5
        flops += replayed[name] * (name in RECOMPUTED[settings["recompute"]])
        rate = MATMUL if name in of_matrices else ATTENTION
        time += flops * (WINDOW if name == "window" else 1) / rate
    sequences = settings["micro_batches"] * settings["micro_batch"] / settings["sp"]  # of this rank
    time = time * sequences + settings["micro_batches"] * PER_PARAMETER * settings["parameters"]
    if "adapters" in settings:
        time += settings["micro_batches"] * settings["adapters"]["seconds"]
    sent = {kind: size / gbps / 1e9 for kind, size in sent_bytes(config, **settings).items()}
    between = sent.pop("all_to_all")
    return max(time, sum(sent.values())) + between


# --------------------------------------------------------------------------------------------------
# Search


def fastest(config, settings, usable, choices):
    """The settings with the least estimated time that need at most `usable` bytes, or None. In
    `choices` are dictionaries of what may differ from `settings`."""
    tried = sorted((settings | choice for choice in choices), key=lambda s: seconds(config, s))
    return next((s for s in tried if peak(config, s) <= usable), None)


def recomputations(layers):
    """What can be recomputed, kept and moved to the host, from the fastest to the smallest."""
    yield {"recompute": "none", "keep_blocks": 0, "offload": False}
    for recompute in "attention", "all":
        for blocks in range(layers - 1, -1, -1):
            yield {"recompute": recompute, "keep_blocks": blocks, "offload": False}
    for recompute in "attention", "all":
        yield {"recompute": recompute, "keep_blocks": 0, "offload": True}


def divisions(options, config, ranks):
    """How a step's sequences can be divided among the ranks: sp and micro_batch that check_ranks
    accepts."""
    for sp in (n for n in range(1, ranks + 1) if ranks % n == 0):
        each = options.batch_size * sp // ranks  # sequences of a group of sp ranks
        for micro_batch in (n for n in range(1, each + 1) if each % n == 0):
            with suppress(ValueError):
                check_ranks(replace(options, sp=sp, micro_batch=micro_batch), config, ranks)
                micro_batches = each // micro_batch
                yield {"sp": sp, "micro_batch": micro_batch, "micro_batches": micro_batches}


def search(options, config, settings, usable):
    """[settings]: for each optimizer, the most exact first, the fastest that need at most `usable`
    bytes."""
    found, ways = [], list(divisions(options, config, settings["ranks"]))
    for optimizer in BYTES:
        choices = (
            way | recomputation | {"optimizer": optimizer}
            for way in ways
            for recomputation in recomputations(config.num_hidden_layers)
        )
        if best := fastest(config, settings, usable, choices):
            found.append(best)
    return found


# --------------------------------------------------------------------------------------------------
# What the dry run prints


def count(number, what, plural="s"):
    return f"{number} {what}{plural if number != 1 else ''}"


def arithmetic(options, config, parameters, ranks, states=None):
    """What a step consists of, in words. Its FLOPs are an upper bound: packed documents have less
    attention. states: see budget.estimate."""
    weight, gradient, kept = BYTES[options.optimizer]
    each = weight + gradient + (states or {}).get(options.optimizer, kept)
    groups, tokens = ranks // options.sp, options.batch_size * options.seq_len
    micro_batches = options.batch_size // groups // options.micro_batch
    flops = flops_per_token(config, options.seq_len, options.lora_rank > 0)
    again = recomputed_flops(config, options.seq_len, options.recompute, options.keep_blocks)
    more = f", and {again / flops:.0%} more for what is recomputed" if again else ""
    return (
        f"{parameters:,} parameters, optimizer {options.optimizer} at "
        f"{each:g} bytes each\n"
        f"{tokens:,} tokens a step = {count(micro_batches, 'micro-batch', 'es')} x "
        f"{count(groups, 'group')} (sp {options.sp}) x {count(options.micro_batch, 'sequence')} x "
        f"{options.seq_len:,} tokens; "
        f"{flops * tokens:.3g} FLOPs{more}, if each sequence is one document"
    )


def describe(config, settings):
    """Settings as options of train.py, with their estimated time and memory."""
    time, ranks = seconds(config, settings), settings["ranks"]
    names = "sp", "micro_batch", "optimizer", "recompute", "keep_blocks", "offload"
    written = " ".join(f"--{name}={str(settings[name]).lower()}" for name in names)
    sequences = settings["micro_batches"] * settings["micro_batch"] / settings["sp"]
    speed = sequences * settings["seq_len"] / time
    return (
        f"{written}\n{'':8}{peak(config, settings) / GIB:.1f} GiB on {gpus(ranks)}, about "
        f"{time:.1f} s a step on H100s ({speed:,.0f} tok/s per GPU)"
    )


def gpus(ranks):
    return "one GPU" if ranks == 1 else f"each of {ranks} GPUs"


def verdict(options, config, settings, gpu_gib):
    """Yield lines: does the run fit GPUs of `gpu_gib`, and what would?"""
    ranks, usable = settings["ranks"], room(gpu_gib, settings["ranks"])
    needed = peak(config, settings)
    left = gpu_gib - needed / GIB
    gpu = f"a GPU of {options.gpu_gib or round(gpu_gib, 1):g} GiB"
    if needed <= usable:
        yield f"fits {gpu}: {left:.1f} GiB left"
    elif left >= 0:
        yield f"does not fit {gpu}: {left:.1f} GiB left for CUDA and NCCL"
    else:
        yield f"does not fit {gpu}: {-left:.1f} GiB too much"
    if found := search(options, config, settings, usable):
        yield "the fastest settings that fit, for each optimizer (see --help):"
        for best in found:
            yield f"  {describe(config, best)}"
        return
    yield f"no settings fit {count(ranks, 'GPU')} at batch_size={options.batch_size}"
    more = ranks
    while more < 64 * ranks:
        more *= 2
        # a larger batch, if there are more groups than sequences
        larger = replace(options, batch_size=max(options.batch_size, more))
        if found := search(larger, config, settings | {"ranks": more}, room(gpu_gib, more)):
            batch = f" and --batch_size={larger.batch_size}" * (larger != options)
            yield f"{more} GPUs{batch} would do:\n  {describe(config, found[0])}"
            break
    if "adapters" not in settings:
        yield "or train adapters, on one GPU from 24 GB up: configs/gptoss_lora.py"


def dry_run(options, build_optimizer=None):
    """Print what the run will need, and with the memory of a GPU known also whether that fits.
    build_optimizer: train.py's; without it the optimizer's state is taken to be AdamW's."""
    ranks, config = int(os.environ.get("WORLD_SIZE", options.ranks)), model_config(options)
    check_ranks(options, config, ranks)
    if os.environ.get("RANK", "0") != "0":
        return
    settings = settings_of(options, config, ranks)
    if build_optimizer and not options.lora_rank:  # adapters' state is small
        settings["states"] = {
            kind: state_bytes(build_optimizer, replace(options, optimizer=kind), config)
            for kind in BYTES
        }
    print(arithmetic(options, config, settings["parameters"], ranks, settings.get("states")))
    for what, size in needs(config, settings).items():
        print(f"{size / GIB:8.1f} GiB  {what}")
    total = peak(config, settings) / GIB
    print(f"{total:8.1f} GiB  peak of {gpus(ranks)}, without what CUDA and NCCL take")
    if options.offload:  # the last block's output goes there, too
        hidden = options.micro_batch * options.seq_len // options.sp * config.hidden_size * 2
        host = hidden * (config.num_hidden_layers + 1) / GIB
        print(f"{host:8.1f} GiB  of host memory for each GPU: the blocks' inputs")
    if gpu_gib := card(options):
        for line in verdict(options, config, settings, gpu_gib):
            print(line)
