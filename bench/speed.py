"""Speed and memory of forward and backward on one GPU, ours and transformers'.

A model is built where it will run, in the dtype it will have; only one exists at a time.
"""

import importlib.metadata
import math
import statistics
import time

import torch
import torch.nn.functional as F

import flash
from bench.common import (
    DEVICE,
    DTYPE,
    GIB,
    GPU,
    LONG,
    K,
    attempt,
    random_tokens,
    release,
    synchronize,
)
from bench.kernels import OPERATIONS, best_rates, floor
from bench.report import length, say, say_row
from loop.budget import RECOMPUTED, flops_per_token
from model import GPTOSS, IGNORED


def build_ours(config, dtype=DTYPE):
    with torch.device("meta"):
        model = GPTOSS(config)
    model = model.to(dtype).to_empty(device=DEVICE)
    model.init_weights()
    return model


def build_theirs(config, dtype=DTYPE):
    """transformers' GptOssForCausalLM at its fastest: flex attention, grouped experts, gradient
    checkpointing."""
    import transformers

    from convert_hf import hf_config

    transformers.logging.set_verbosity_error()
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GptOssConfig.from_dict(hf_config(config, dtype, False, {})),
            dtype=dtype,
            attn_implementation="flex_attention" if GPU else "eager",  # flex has no sinks on a CPU
            experts_implementation="grouped_mm",
        )
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()
    return model.train()


def our_loss(model, tokens):
    """With the targets that transformers makes from its labels: the last token has none."""
    return model(tokens, F.pad(tokens[:, 1:], (0, 1), value=IGNORED))


def their_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


# --------------------------------------------------------------------------------------------------
# One row


def step(model, loss_of, tokens):
    """(seconds, loss) of one forward and backward. ValueError if the loss is not finite: such a
    step measures nothing."""
    model.zero_grad(set_to_none=True)
    synchronize()
    began = time.perf_counter()
    loss = loss_of(model, tokens)
    loss.backward()
    synchronize()
    elapsed = time.perf_counter() - began
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss is {loss.item()}")
    return elapsed, loss.item()


def measure_steps(config, S, tokens, run):
    """Speed and memory of run(), which returns the seconds of a step with `tokens` tokens of this
    GPU, in sequences of S.

    The first step compiles and does not count; then the median of three, or from 64K tokens on one
    step. Of a million tokens the first step is the only one, and compilation is in it. retries: how
    often, in the steps that count, the allocator ran out of memory, returned what was free to the
    driver and tried again."""
    torch._dynamo.reset()  # so that this length is compiled for itself, not for any length
    times = []
    for number in range(1 if S >= K * K else 2 if S >= LONG else 4):
        if GPU and number < 2:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.reset_accumulated_memory_stats()
        times.append(run())
    steady = statistics.median(times[1:] or times)
    return {
        "seconds": steady,
        "compile_seconds": max(times[0] - steady, 0) if len(times) > 1 else None,
        "tokens_per_second": tokens / steady,
        "tflops": flops_per_token(config, S) * tokens / steady / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if GPU else None,
        "retries": torch.cuda.memory_stats()["num_alloc_retries"] if GPU else None,
    }


def measure_row(config, model, loss_of, S):
    tokens = random_tokens(config, S)
    if GPU:  # its trial run compiles for other sizes than ours: now
        flash.cudnn_refuses(DEVICE, DTYPE, config.head_dim)
    try:
        return measure_steps(config, S, S, lambda: step(model, loss_of, tokens)[0])
    finally:
        model.zero_grad(set_to_none=True)


def rows_of(name, model, config, lengths, recompute):
    """Yield a row for each length. recompute "auto": the least that fits; what ran out of memory is
    not tried at more tokens."""
    modes = ["none", "attention", "all"] if recompute == "auto" else [recompute]
    ours = name == "ours"
    # FlexAttention would otherwise fall back to S x S scores silently; transformers exceeds the
    # limit
    torch._dynamo.config.fail_on_recompile_limit_hit = ours
    for S in sorted(lengths):
        while True:
            if ours:
                model.recompute = modes[0]
            row = {"model": name, "row": length(S), "tokens": S, "recompute": modes[0]}
            row |= attempt(measure_row, config, model, our_loss if ours else their_loss, S)
            if row.get("error") != "out of memory" or len(modes) == 1:
                break
            say(f"({length(S)} with recompute={modes.pop(0)}: out of memory)")
        yield row


# --------------------------------------------------------------------------------------------------
# The table

SPEED = [
    ("tok/s", "tokens_per_second", ">10,.0f"),
    ("TFLOP/s", "tflops", ">10.4g"),
    ("of matmul", "share_of_matmul", ">11.0%"),
]
ROW = [
    ("model", "model", "<14"),
    ("tokens", "row", ">7"),
    ("recompute", "recompute", ">11"),
    *SPEED,
    ("x floor", "distance", ">9.2f"),
    ("x own", "own_distance", ">7.2f"),
    ("peak GiB", "peak_gib", ">10.1f"),
    ("compile s", "compile_seconds", ">11.1f"),
]


def compare_row(config, row, results):
    """Add to a row its distance from the ceilings and the floors, and from our row of the same
    length."""
    rates = best_rates(results["ceilings"], row["tokens"])
    if "matmul" in rates:
        row["share_of_matmul"] = row["tflops"] / rates["matmul"]["forward"]
    if row["model"] == "ours" and set(OPERATIONS) <= rates.keys():
        own = floor(config, row["tokens"], rates, RECOMPUTED[row["recompute"]])
        row["floor"] = floor(config, row["tokens"], rates)
        row["floor_seconds"] = sum(row["floor"].values())
        row["distance"] = row["seconds"] / row["floor_seconds"]
        row["own_floor_seconds"] = sum(own.values())
        row["own_distance"] = row["seconds"] / row["own_floor_seconds"]
    for other in results["rows"]:
        if row["model"] != "ours" and other["tokens"] == row["tokens"] and "seconds" in other:
            row["ours_faster"] = row["seconds"] / other["seconds"]


def section(options, config, results):
    def run(name, model, recompute, columns):
        say_row(columns)
        for row in rows_of(name, model, config, options.rows, recompute):
            if "error" not in row:
                compare_row(config, row, results)
            results.add("rows", row)
            say_row(columns, row)

    say("\nForward + backward")
    run("ours", build_ours(config), options.recompute, ROW)
    say_floors([row for row in results["rows"] if "floor" in row])
    release()
    if options.against:
        theirs = build_theirs(config)
        version = importlib.metadata.version("transformers")
        results["machine"]["transformers"] = version
        attention = theirs.config._attn_implementation
        say(f"\ntransformers {version}: {attention}, grouped_mm experts, gradient checkpointing")
        run("transformers", theirs, "all", [*ROW, ("ours, times", "ours_faster", ">13.2f")])


def say_floors(rows):
    """Print the composed floors by their parts."""
    if not rows:
        return
    say("\nComposed floor, s: each matmul and attention at its ceiling; attention and unembedding")
    say("once forward, the other matmuls twice (recomputed), all once backward")
    columns = [
        ("tokens", "row", ">8"),
        ("step", "seconds", ">10.4f"),
        ("floor", "floor_seconds", ">10.4f"),
        *((name, name, ">12.4f") for name in OPERATIONS),
    ]
    say_row(columns)
    for row in rows:
        say_row(columns, row | row["floor"])
