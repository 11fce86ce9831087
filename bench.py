"""How fast, how large, how exact: the measurements behind the README's tables and plot, each by one command.

    python bench.py                                   # forward + backward of the 20b at 4K … 128K tokens, beside its ceilings
    python bench.py --against=transformers            # and transformers on the same rows
    torchrun --nproc_per_node 2 bench.py              # full training steps at 16 x 4K … 1M tokens, FSDP2 + Ulysses + optimizer
    python bench.py --profile --rows=32K              # where the GPU time of one step goes; a trace for ui.perfetto.dev
    python bench.py --accuracy                        # bf16 error of ours and of transformers, against fp32
    python bench.py --deterministic=true              # are two runs equal to the bit, and what does that cost
    python bench.py --plot                            # docs/bench.png from what an earlier run wrote

It needs no download: weights and tokens are random. `--layers=4` fits a small card; without a GPU a tiny model stands in.
Every row prints as soon as it is known.

FLOPs are model FLOPs: nothing recomputed, active experts only, only keys that attention may see; for an attention kernel
alone, a backward counts 2.5 forwards, because it makes the scores again. A ceiling is the rate of one kernel by itself.
The composed floor is the time of a step in which every matmul and attention runs at its ceiling in the same run and nothing
else takes any time: attention once forward; qkv, out, gate_up and down twice, because a block is recomputed; the unembedding
once, its gradient being made in the forward; all of them once backward. It is the same whatever a row recomputes; the row's own
floor, beside it, counts what this row computes, and no more.

References: model FLOPs, https://arxiv.org/abs/2204.02311; the count of 2.5, https://arxiv.org/abs/2307.08691.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import argparse
import copy
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import re
import statistics
import time
from collections import defaultdict
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile, record_function

import fast
import model as gptoss
import sp
from loop.budget import flops_per_token
from model import GPTOSS, IGNORED, GPTOSSConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
K, GIB = 1024, 2**30
LONG = (
    64 * K
)  # from here on a step takes seconds: timed once, and attention's rate no longer changes
TINY = GPTOSSConfig(
    num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=512, hidden_size=64, intermediate_size=64,
    head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Output, failures, clocks


def say(text=""):
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def say_row(columns, row=None):
    """A line of a table, or its head. columns: (title, key in the row, format that starts with < or > and a width)."""
    line = ""
    for title, key, form in columns:
        value = title if row is None else row.get(key)
        value = (
            "-" if value is None else "yes" if value is True else "no" if value is False else value
        )
        line += format(value, re.match(r"[<>]\d+", form)[0] if isinstance(value, str) else form)
    say(line + (f"  {row['error']}" if row and "error" in row else ""))


class Results(dict):
    """What is known so far, at any time also in the JSON file `path`: a run that is stopped leaves it."""

    def __init__(self, path, **values):
        super().__init__(values)
        self.path, self.writes = path, os.environ.get("RANK", "0") == "0"
        self.save()

    def save(self, **values):
        self.update(values)
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(f".{self.path.name}.partial")
            aside.write_text(json.dumps(self, indent=2) + "\n")
            aside.rename(self.path)

    def add(self, key, row):
        self[key].append(row)
        self.save()


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def release():
    """Give the GPU back what nothing refers to any more."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def attempt(run, *arguments):
    """run(*arguments), a dict; if it fails {"error": why, in one line}. Either way no memory of it stays behind."""
    try:
        return run(*arguments)
    except Exception as error:
        if out_of_memory(error):
            return {"error": "out of memory"}
        return {
            "error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
        }
    finally:
        release()


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def seconds(run, prepare=tuple, repetitions=5):
    """Median time of run(*prepare()), of run alone, after one call that does not count.

    Before each call the GPU overwrites a GiB: its caches then hold nothing of use, and Python has time to queue the call."""
    times, scratch = [], torch.empty(GIB if GPU else 0, dtype=torch.uint8, device=DEVICE)
    for _ in range(repetitions + 1):
        arguments = prepare()
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            run(*arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run(*arguments)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def length(tokens):
    return next(
        f"{tokens // size}{unit}"
        for size, unit in ((K * K, "M"), (K, "K"), (1, ""))
        if tokens % size == 0
    )


def machine():
    gpu = torch.cuda.get_device_properties(DEVICE) if GPU else None
    device, now = (
        f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" if gpu else "CPU",
        datetime.datetime.now().astimezone(),
    )
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    return {
        "device": device,
        **versions,
        "dtype": str(DTYPE).removeprefix("torch."),
        "date": now.isoformat(timespec="seconds"),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings and the floor that they make


def matrices(config):
    """{name: (rows a token brings, inputs, outputs)} of the matmuls that matter; the router's is a thousandth of them."""
    C, heads, kv = (
        config.hidden_size,
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    k, intermediate = config.experts_per_token, config.intermediate_size
    return {
        "qkv": (1, C, heads + 2 * kv),
        "out": (1, heads, C),
        "gate_up": (k, C, 2 * intermediate),
        "down": (k, intermediate, C),
        "unembedding": (1, C, config.vocab_size),
    }


def attention_flops(config, S, window):
    """Of one layer's forward over S tokens: scores and values, for each query the keys it may see."""
    w = min(window or S, S)
    return 4 * config.num_attention_heads * config.head_dim * (S * w - w * (w - 1) / 2)


def forward_flops(config, S):
    """{name: FLOPs} of the forward over S tokens, all layers."""
    layers = config.num_hidden_layers
    flops = {
        name: layers * S * rows * 2 * ins * outs
        for name, (rows, ins, outs) in matrices(config).items()
    }
    flops["unembedding"] /= layers
    windows = [config.window(layer) for layer in range(layers)]
    for name, window in ("causal", None), ("window", config.sliding_window):
        flops[name] = windows.count(window) * attention_flops(config, S, window)
    return flops


def backward_forwards(name):
    return 2.5 if name in ("causal", "window") else 2


AGAIN = {
    "none": (),
    "attention": ("qkv", "out", "gate_up", "window"),
    "all": ("qkv", "out", "gate_up", "window", "causal"),
}


def floor(config, S, rates, again=("qkv", "out", "gate_up", "down")):
    """{name: seconds} of a step over S tokens at rates[name]["forward" or "backward"] TFLOP/s: the composed floor, by parts; or
    the floor of a step that computes `again`, one of AGAIN, twice forward."""
    times = {}
    for name, flops in forward_flops(config, S).items():
        forwards = 2 if name in again else 1
        times[name] = (
            flops
            * (
                forwards / rates[name]["forward"]
                + backward_forwards(name) / rates[name]["backward"]
            )
            / 1e12
        )
    return times


def best_rates(ceilings, S):
    """{name: {"forward", "backward"}} in TFLOP/s for a row of S tokens: of each, the fastest kernel that was measured."""
    rates = defaultdict(lambda: {"forward": 0, "backward": 0})
    for ceiling in ceilings:
        if "error" not in ceiling and ceiling["tokens"] in (None, min(S, LONG)):
            for way in "forward", "backward":
                rates[ceiling["name"]][way] = max(rates[ceiling["name"]][way], ceiling[way])
    return dict(rates)


def random(*shape):
    return torch.randn(
        shape, device=DEVICE, dtype=DTYPE
    )  # not zeros: those cost less power, and run faster


def measure_kernels(name, flops, forward, backward, prepare=tuple):
    """Times and rates of a pair of kernels. `prepare` makes what the backward is called with, and is not timed."""
    there, back = seconds(forward), seconds(backward, prepare)
    rates = {
        "forward": flops / there / 1e12,
        "backward": flops * backward_forwards(name) / back / 1e12,
    }
    return rates | {"forward_ms": there * 1e3, "backward_ms": back * 1e3}


def measure_matmul(config, name):
    """x @ W.T, or of the experts the grouped matmul with equal shares; "matmul" is a large square one."""
    size, tokens = (8192, 32 * K) if GPU else (128, 64)
    rows, ins, outs = matrices(config).get(name, (1, size, size))
    rows *= {"matmul": size, "unembedding": tokens // 8}.get(
        name, tokens
    )  # 32K rows of logits would take 12 GiB
    x, g = random(rows, ins), random(rows, outs)
    if name not in ("gate_up", "down"):
        w = random(outs, ins)
        return measure_kernels(
            name, 2 * rows * ins * outs, lambda: x @ w.t(), lambda: (g @ w, g.t() @ x)
        )
    w, ends = (
        random(config.num_experts, ins, outs),
        torch.arange(1, config.num_experts + 1, device=DEVICE, dtype=torch.int32),
    )
    mm = functools.partial(F.grouped_mm, offs=ends * (rows // config.num_experts))
    return measure_kernels(
        name, 2 * rows * ins * outs, lambda: mm(x, w), lambda: (mm(g, w.mT), mm(x.t(), g))
    )


def attention_kernels(config, S):
    """[(name, which kernel, window, attention(q, k, v, sinks))] of those that can run here."""
    windows = {"causal": None, "window": config.sliding_window}
    if not GPU:
        return [
            (name, "dense", w, functools.partial(gptoss.dense_attention, window=w))
            for name, w in windows.items()
        ]
    masks = {w: fast.block_mask(S, w, None, DEVICE) for w in windows.values()}
    kernels = [
        (name, "Flex", w, functools.partial(gptoss.flex_sink_attention, mask=masks[w]))
        for name, w in windows.items()
    ]
    cudnn = [("causal", "cuDNN", None, fast.CudnnSinkAttention.apply)]
    return kernels if fast.cudnn_refuses(DEVICE, DTYPE, config.head_dim) else cudnn + kernels


def measure_attention(config, name, S, window, attend):
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inputs = [random(1, S, h, D).requires_grad_() for h in (heads, kv_heads, kv_heads)] + [
        random(heads).requires_grad_()
    ]
    g = random(1, S, heads, D)
    torch._dynamo.reset()  # each length compiled for itself, as in the model
    forward, backward = lambda: attend(*inputs), lambda out: torch.autograd.grad(out, inputs, g)
    return measure_kernels(
        name, attention_flops(config, S, window), forward, backward, prepare=lambda: (forward(),)
    )


CEILING = [
    ("\nCeilings", "label", "<40"),
    ("forward: ms", "forward_ms", ">12.2f"),
    ("TFLOP/s", "forward", ">10.4g"),
]
CEILING += [("backward: ms", "backward_ms", ">14.2f"), ("TFLOP/s", "backward", ">10.4g")]


def ceilings_section(options, config, results):
    def measure(label, name, tokens, function, *arguments):
        ceiling = {"label": label, "name": name, "tokens": tokens} | attempt(
            function, config, name, *arguments
        )
        results.add("ceilings", ceiling)
        say_row(CEILING, ceiling)

    say_row(CEILING)
    measure("matmul, square", "matmul", None, measure_matmul)
    for name, (_, ins, outs) in matrices(config).items():
        measure(f"{name}, {ins} -> {outs}", name, None, measure_matmul)
    for S in sorted({min(S, LONG) for S in options.rows}):
        for name, kernel, window, attend in attention_kernels(config, S):
            label = f"attention {length(S)}, {f'window {window}' if window else 'causal'}, {kernel}"
            measure(label, name, S, measure_attention, S, window, attend)


# ----------------------------------------------------------------------------------------------------------------------
# The two models. A model is built where it will run, in the dtype it will have; only one exists at a time.


def build_ours(config):
    with torch.device("meta"):
        model = GPTOSS(config)
    model = model.to(DTYPE).to_empty(device=DEVICE)
    model.init_weights()
    return model


def build_theirs(config):
    """transformers' GptOssForCausalLM at its fastest: flex attention, grouped experts, gradient checkpointing."""
    import transformers

    from convert_hf import hf_config

    transformers.logging.set_verbosity_error()
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GptOssConfig.from_dict(hf_config(config, DTYPE, False, {})),
            dtype=DTYPE,
            attn_implementation="flex_attention"
            if GPU
            else "eager",  # its flex has no sinks on a CPU
            experts_implementation="grouped_mm",
        )
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )  # older name
    enable()
    return model.train()


def our_loss(model, tokens):
    """With the targets that transformers makes from its labels: the last token has none."""
    return model(tokens, F.pad(tokens[:, 1:], (0, 1), value=IGNORED))


def their_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def random_tokens(config, S):
    return torch.randint(
        config.vocab_size, (1, S), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0)
    )


# ----------------------------------------------------------------------------------------------------------------------
# Rows: forward and backward of one sequence


def step(model, loss_of, tokens):
    """(seconds, loss) of one forward and backward. ValueError if the loss is no number: such a step measures nothing."""
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
    """Speed and memory of run(), which takes a step with `tokens` tokens on this GPU in sequences of S, and returns its seconds.

    The first step compiles and does not count; then the median of three, or one that takes seconds. Of a million tokens the
    first is the only one: there compilation is in it. retries: how often in the steps that count the allocator ran out, gave
    memory back to the driver and tried again, which takes time; that of the first step too, if it is the only one."""
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
    if GPU:
        fast.cudnn_refuses(
            DEVICE, DTYPE, config.head_dim
        )  # now, because its trial run compiles for other sizes than ours
    try:
        return measure_steps(config, S, S, lambda: step(model, loss_of, tokens)[0])
    finally:
        model.zero_grad(set_to_none=True)


def rows_of(name, model, config, rows, recompute):
    """Yield a row for each length. recompute "auto": the least that fits; what ran out of memory is not tried at more tokens."""
    modes = ["none", "attention", "all"] if recompute == "auto" else [recompute]
    loss_of = our_loss if name == "ours" else their_loss
    torch._dynamo.config.fail_on_recompile_limit_hit = (
        name == "ours"
    )  # or Flex would fall back to S x S scores in silence
    for S in sorted(rows):
        while True:
            if name == "ours":
                model.recompute = modes[0]
            row = {"model": name, "row": length(S), "tokens": S, "recompute": modes[0]}
            row |= attempt(measure_row, config, model, loss_of, S)
            if row.get("error") != "out of memory" or len(modes) == 1:
                break
            say(f"({length(S)} with recompute={modes.pop(0)}: out of memory)")
        yield row


ROW = [("model", "model", "<14"), ("tokens", "row", ">7"), ("recompute", "recompute", ">11")]
SPEED = [
    ("tok/s", "tokens_per_second", ">10,.0f"),
    ("TFLOP/s", "tflops", ">10.4g"),
    ("of matmul", "share_of_matmul", ">11.0%"),
]
ROW += SPEED + [
    ("x floor", "distance", ">9.2f"),
    ("x own", "own_distance", ">7.2f"),
    ("peak GiB", "peak_gib", ">10.1f"),
]
ROW += [("compile s", "compile_seconds", ">11.1f")]


def compare_row(config, row, results):
    """Add to a row how it stands to the ceilings, to the floor, and to ours of the same length."""
    rates = best_rates(results["ceilings"], row["tokens"])
    if "matmul" in rates:
        row["share_of_matmul"] = row["tflops"] / rates["matmul"]["forward"]
    if row["model"] == "ours" and forward_flops(config, 1).keys() <= rates.keys():
        row["floor"] = floor(config, row["tokens"], rates)
        row["floor_seconds"] = sum(row["floor"].values())
        row["distance"] = row["seconds"] / row["floor_seconds"]
        row["own_floor_seconds"] = sum(
            floor(config, row["tokens"], rates, AGAIN[row["recompute"]]).values()
        )
        row["own_distance"] = row["seconds"] / row["own_floor_seconds"]
    for other in results["rows"]:
        if row["model"] != "ours" and other["tokens"] == row["tokens"] and "seconds" in other:
            row["ours_faster"] = row["seconds"] / other["seconds"]


def rows_section(options, config, results):
    def run(name, model, recompute, columns):
        say_row(columns)
        for row in rows_of(name, model, config, options.rows, recompute):
            if "error" not in row:
                compare_row(config, row, results)
            results.add("rows", row)
            say_row(columns, row)

    say("\nForward + backward")
    run("ours", build_ours(config), options.recompute, ROW)
    floors = [row for row in results["rows"] if "floor" in row]
    if floors:
        say(
            "\nComposed floor, s: each matmul and attention at its ceiling; attention and unembedding once forward, the other"
        )
        say("matmuls twice (recomputed), all once backward")
        columns = [
            ("tokens", "row", ">8"),
            ("step", "seconds", ">10.4f"),
            ("floor", "floor_seconds", ">10.4f"),
        ]
        columns += [(name, name, ">12.4f") for name in floors[0]["floor"]]
        for row in (None, *(row | row["floor"] for row in floors)):
            say_row(columns, row)
    release()
    if options.against:
        theirs = build_theirs(config)
        version, attention = (
            importlib.metadata.version("transformers"),
            theirs.config._attn_implementation,
        )
        results["machine"]["transformers"] = version
        say(f"\ntransformers {version}: {attention}, grouped_mm experts, gradient checkpointing")
        run("transformers", theirs, "all", [*ROW, ("ours, times", "ours_faster", ">13.2f")])


# ----------------------------------------------------------------------------------------------------------------------
# Training on several GPUs: full steps, as train.py makes them


def exposed(communication, computation):
    """How long something of `communication` and nothing of `computation` goes on; both are lists of (start, end)."""
    kinds = enumerate((communication, computation))
    edges = sorted(
        (t, kind, change)
        for kind, spans in kinds
        for span in spans
        for t, change in zip(span, (1, -1))
    )
    running, last, total = [0, 0], 0, 0
    for t, kind, change in edges:
        if running[0] and not running[1]:
            total += t - last
        running[kind] += change
        last = t
    return total


def communication_share(run):
    """The share of run(), which returns its seconds, in which the GPU does nothing but communicate."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        elapsed = run()
    kernels = defaultdict(list)
    for e in profiler.events():
        if (
            e.device_type == DeviceType.CUDA and not e.is_user_annotation
        ):  # those span kernels, and are none
            kernels[e.name.startswith("nccl")].append((e.time_range.start, e.time_range.end))
    return exposed(kernels[True], kernels[False]) / 1e6 / elapsed


def training_step(model, optimizer, tokens, targets, count, offload):
    """(seconds of a step, of its optimizer) with gradients clipped to 1."""
    from loop.memory import HostMemory
    from train import all_sum, gradient_norm_squared

    synchronize()
    dist.barrier()
    began = time.perf_counter()
    with HostMemory() if offload else nullcontext():
        loss = model(tokens, targets, count=count)
    loss.backward()
    loss, square = all_sum(loss.detach(), gradient_norm_squared(model), device=DEVICE)
    if not math.isfinite(loss + square):
        raise ValueError(f"the loss is {loss}, the squared norm of the gradient {square}")
    if square > 1:
        torch._foreach_mul_([p.grad for p in model.parameters()], square**-0.5)
    synchronize()
    middle = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - began, time.perf_counter() - middle


def measure_training(config, model, optimizer, row):
    """What to add to a row. Its peak memory is that of the rank with the most."""
    ranks, S, in_optimizer = dist.get_world_size(), row["sequence"], []
    release()
    sp.init(
        init_device_mesh(
            DEVICE.type, (ranks // row["sp"], row["sp"]), mesh_dim_names=("batch", "sp")
        )["sp"]
    )
    generator = torch.Generator().manual_seed(dist.get_rank() // row["sp"])
    whole = torch.randint(config.vocab_size, (2, row["micro_batch"], S), generator=generator)
    tokens, targets = (x.to(DEVICE) for x in sp.shard(*whole))
    count = torch.tensor(row["tokens"], device=DEVICE)

    def run():
        elapsed, part = training_step(model, optimizer, tokens, targets, count, row["offload"])
        in_optimizer.append(part)
        return elapsed

    found = measure_steps(config, S, row["tokens"] / ranks, run) | {
        "optimizer_seconds": in_optimizer[-1]
    }
    if GPU:
        peak = torch.tensor(found["peak_gib"], device=DEVICE)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found |= {
            "peak_gib": peak.item(),
            "communication": communication_share(run) if S <= LONG else None,
        }
    return found


def ranks_that_share(options, ranks, sequences):
    """How many ranks share each sequence of a row: what --sp says, or as many as there are for each."""
    return max(1, ranks // sequences) if options.sp is None else options.sp


def least_recomputation(options, layers, needs):
    """The settings that compute least again and, by the estimate needs(settings) in bytes, leave a twelfth of the GPU free. Those
    that were given stay, whether they fit or not."""
    room = 11 / 12 * torch.cuda.get_device_properties(DEVICE).total_memory if GPU else math.inf
    modes = ["attention", "all"] if options.recompute == "auto" else [options.recompute]
    blocks = range(layers, -1, -1) if options.keep_blocks is None else [options.keep_blocks]
    choices = [{"recompute": modes[0], "keep_blocks": n, "offload": False} for n in blocks]
    if not options.keep_blocks and options.recompute != "none":
        choices += [{"recompute": mode, "keep_blocks": 0, "offload": GPU} for mode in modes]
    return next((choice for choice in choices if needs(**choice) <= room), choices[-1])


TRAINING = [("sequences", "row", "<11"), ("sp", "sp", ">3"), ("recompute", "recompute", ">10")]
TRAINING += [("kept blocks", "keep_blocks", ">12"), ("offload", "offload", ">8")]
TRAINING += SPEED + [
    ("peak GiB", "peak_gib", ">10.1f"),
    ("estimate", "estimate_gib", ">9.1f"),
    ("step s", "seconds", ">9.3f"),
]
TRAINING += [
    ("optimizer s", "optimizer_seconds", ">12.3f"),
    ("communication", "communication", ">14.1%"),
]
TRAINING += [("retries", "retries", ">8"), ("compile s", "compile_seconds", ">10.1f")]


def training_section(options, config, results):
    from loop.budget import estimate
    from loop.options import Options
    from train import all_sum, build_model, build_optimizer, start_ranks

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ranks, config = int(os.environ["WORLD_SIZE"]), replace(config, max_position_embeddings=K * K)
    settings = Options(**asdict(config), optimizer=options.optimizer, batch_size=ranks)
    device, mesh = start_ranks(settings)
    ceiling = all_sum(measure_matmul(config, "matmul")["forward"], device=device)[0] / ranks
    model = build_model(settings, config, device, mesh, DTYPE)
    optimizer, parameters = (
        build_optimizer(settings, model),
        sum(p.numel() for p in model.parameters()),
    )
    results.save(ranks=ranks, optimizer=options.optimizer, matmul=ceiling)

    def peak(**row):
        needs = estimate(
            config,
            parameters=parameters,
            ranks=ranks,
            replicas=1,
            optimizer=options.optimizer,
            **row,
        )
        return sum(needs.values())

    say(
        f"\nFull training steps on {ranks} ranks, optimizer {options.optimizer}; tok/s and TFLOP/s are one GPU's, and"
    )
    say(
        f"of matmul means of {ceiling:.4g} TFLOP/s; communication: a profiled step's share in which only NCCL's kernels run"
    )
    say_row(TRAINING)
    for sequences, S in options.rows:
        n = ranks_that_share(options, ranks, sequences)
        rows = max(1, sequences * n // ranks)  # a rank's sequences
        needs = functools.partial(peak, seq_len=S, sp=n, micro_batch=rows)
        settings = least_recomputation(options, config.num_hidden_layers, needs)
        model.recompute, model.keep_blocks = settings["recompute"], settings["keep_blocks"]
        sequences = rows * ranks // n
        row = {
            "row": f"{sequences} x {length(S)}",
            "sequence": S,
            "tokens": sequences * S,
            "sp": n,
            "micro_batch": rows,
        }
        row |= settings | {"estimate_gib": needs(**settings) / GIB}
        try:
            row |= measure_training(config, model, optimizer, row)
            row["share_of_matmul"] = row["tflops"] / ceiling
        except Exception as error:
            if not out_of_memory(error):
                raise
            results.writes = True
            results.add("rows", row | {"error": "out of memory"})
            print(
                f"{row['row']}: out of memory on rank {dist.get_rank()}; the table ends, no rank can go on alone",
                flush=True,
            )
            os._exit(
                1
            )  # at once: the others wait for this rank inside NCCL, until its end makes torchrun end them
        results.add("rows", row)
        say_row(TRAINING, row)
    dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Profile: where the time of one step goes. Every piece of time belongs to the innermost room around it; what the backward
# does, to the room of the forward operation that it undoes.

ROOM = "room: "
ATTENTION, PROJECTIONS, EXPERTS, LOSS = (
    ROOM + name for name in ("attention", "projections", "experts and router", "loss")
)
REST = ROOM + "norms, rotary, residuals and the rest"


def in_room(room, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(room):
            return function(*args, **kwargs)

    return call


def label_rooms(model):
    """Label what the blocks do; returns a choose_attention that labels attention."""
    for block in model.blocks:
        block.forward = in_room(REST, block.forward)
        block.mlp.forward = in_room(EXPERTS, block.mlp.forward)
        for projection in block.attention.qkv, block.attention.out:
            projection.forward = in_room(PROJECTIONS, projection.forward)
    choose = gptoss.choose_attention
    return lambda *args: in_room(ATTENTION, choose(*args))


def time_by_room(events):
    """({room: ms}, [(kernel, ms, count)]) of the profiler's events: of the GPU's kernels, or on a CPU of the operations."""
    # (thread, sequence number) -> the forward operation that made this node of the backward graph. Events of the backward
    # name the thread of their forward. Of several operations with one number the last made the node, and stays.
    numbered = sorted(
        (e for e in events if e.sequence_nr >= 0 and not e.fwd_thread),
        key=lambda e: e.time_range.start,
    )
    forward = {(e.thread, e.sequence_nr): e for e in numbered}
    annotations = {e.name for e in events if e.is_user_annotation}  # on the GPU they span kernels

    def room(event):
        while event is not None:
            if event.name.startswith(ROOM) or event.name == "CrossEntropy":
                return LOSS if event.name == "CrossEntropy" else event.name
            undone = (
                forward.get((event.fwd_thread, event.sequence_nr)) if event.fwd_thread else None
            )
            earlier = (
                undone is not None and undone.time_range.start < event.time_range.start
            )  # surely, or this may not end
            event = undone if earlier else event.cpu_parent
        return REST

    rooms, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        pieces = [
            (kernel.name, kernel.duration)
            for kernel in event.kernels
            if kernel.name not in annotations
        ]
        for name, microseconds in pieces if GPU else [(event.name, event.self_cpu_time_total)]:
            rooms[room(event)] += microseconds / 1e3
            kernels[name][0] += microseconds / 1e3
            kernels[name][1] += 1
    return dict(rooms), sorted(
        ((name, ms, n) for name, (ms, n) in kernels.items()), key=lambda kernel: -kernel[1]
    )


def profile_section(options, config, results):
    S, model = options.rows[0], build_ours(config)
    with patch.object(gptoss, "choose_attention", label_rooms(model)):
        say("\nThe step, without the profiler")
        say_row(ROW)
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        results.add("rows", row)
        say_row(ROW, row)
        if "error" in row:
            return
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * GPU) as profiler:
            elapsed, _ = step(model, our_loss, random_tokens(config, S))
    trace = options.out / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    rooms, kernels = time_by_room(profiler.events())
    total = sum(rooms.values())
    results.save(rooms_ms=rooms, kernels=kernels[:20])
    say(
        f"\nWith the profiler {elapsed * 1e3:.1f} ms, of which the {'GPU' if GPU else 'CPU'} works {total:.1f} ms:"
    )
    by_room = [
        (room.removeprefix(ROOM), ms, "")
        for room, ms in sorted(rooms.items(), key=lambda item: -item[1])
    ]
    for name, ms, count in by_room + [("what takes longest:", 0, "")] + kernels[:20]:
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}{count:>6}  {name[:100]}" if ms else f"\n{name}")
    say(f"\n{trace}: open it in https://ui.perfetto.dev")


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: how far bf16 is from fp32 with the same weights, for us and for transformers


def relative_errors(measured, truth):
    """{group: |measured - truth| / |truth|} of two {name: tensor}. A group is, as one long vector, what has one name in all
    layers, weights and biases: blocks.3.attention.qkv.bias belongs to qkv."""
    error, norm = defaultdict(float), defaultdict(float)
    for name, t in truth.items():
        group = re.sub(r"blocks\.\d+\.(attention\.|mlp\.)?|[._](weight|bias)$", "", name)
        error[group] += (
            (measured[name].float() - t.float()).square().sum(dtype=torch.float64).item()
        )
        norm[group] += t.float().square().sum(dtype=torch.float64).item()
    return {
        group: math.sqrt(error[group] / norm[group]) if norm[group] else math.nan for group in norm
    }


def logits_and_gradients(model, norm, unembedding, loss_of, tokens):
    """{"logits" or parameter name: logits or gradient}, of one forward and backward: compiling for a second one takes long."""
    features = []
    hook = norm.register_forward_hook(lambda module, inputs, out: features.append(out.detach()))
    loss_of(model, tokens).backward()
    hook.remove()
    return {"logits": unembedding(features[0]).detach()} | {
        name: p.grad for name, p in model.named_parameters()
    }


def as_defined():
    """A context in which our model computes by definition: dense attention, nothing compiled. It is the truth to compare
    with, and takes seconds where fp32 kernels, which nobody else needs, would compile for minutes."""
    context = ExitStack()
    dense = lambda S, window, *_: functools.partial(gptoss.dense_attention, window=window)  # noqa: E731
    context.enter_context(patch.object(gptoss, "choose_attention", dense))
    context.enter_context(torch.compiler.set_stance("force_eager"))
    return context


def accuracy_section(options, config, results):
    from convert_hf import HUGGING_FACE, counterparts

    began, S = time.perf_counter(), options.rows[0]

    def progress(text):
        say(f"{time.perf_counter() - began:6.1f} s  {text}")

    tokens, ours = random_tokens(config, S), build_ours(config)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():  # as initialised these are zero, and would hide what is wrong with them
        for name, p in ours.named_parameters():
            if name.endswith(("bias", "sinks")):
                p.normal_(0, 1 if name.endswith("sinks") else 0.02, generator=generator)
    progress("our model is built; now in float32, by definition")
    exact = copy.deepcopy(ours).float()
    exact.recompute = "all"  # the scores of a layer take many GiB
    with as_defined():
        truth = logits_and_gradients(exact, exact.norm, exact.unembedding, our_loss, tokens)
    progress(f"now in {results['machine']['dtype']}, compiled")
    errors = {
        "ours": relative_errors(
            logits_and_gradients(ours, ours.norm, ours.unembedding, our_loss, tokens), truth
        )
    }
    progress("now transformers with the same weights")
    pairs, theirs = counterparts(config, HUGGING_FACE, False), build_theirs(config)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for pair, p in zip(pairs, ours.parameters()):
            for name, value in zip(pair.theirs, pair.to_theirs(p)):
                parameters[name].copy_(value)
    del ours
    release()
    progress("now transformers, compiled")
    found = logits_and_gradients(theirs, theirs.model.norm, theirs.lm_head, their_loss, tokens)
    renamed = {pair.name: pair.to_ours(*(found[name] for name in pair.theirs)) for pair in pairs}
    errors["transformers"] = relative_errors(renamed | {"logits": found["logits"]}, truth)
    progress("done")

    results.save(tokens=S, truth="ours in float32, dense attention", errors=errors)
    say(
        f"\nRelative error at {length(S)} of {results['machine']['dtype']} against the definition in float32:"
    )
    say("of the logits, and of the gradient of")
    columns = [
        ("", "name", "<16"),
        ("ours", "ours", ">12.2e"),
        ("transformers", "theirs", ">14.2e"),
        ("ratio", "ratio", ">8.2f"),
    ]
    say_row(columns)
    for name, error in errors["ours"].items():
        theirs = errors["transformers"][name]
        say_row(
            columns,
            {
                "name": name,
                "ours": error,
                "theirs": theirs,
                "ratio": error / theirs if theirs else None,
            },
        )
    worst = max(
        error / errors["transformers"][name]
        for name, error in errors["ours"].items()
        if errors["transformers"][name]
    )
    say(f"Largest ratio {worst:.2f}: ours is {'nowhere' if worst <= 1 else 'somewhere'} less exact")


# ----------------------------------------------------------------------------------------------------------------------
# Determinism: is a step the same to the bit when it is done again, and what that costs


def deterministic_section(options, config, results):
    S, model = options.rows[0], build_ours(config)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it would fill every new tensor, to no use here
    )
    say("\nForward + backward, then the same with torch.use_deterministic_algorithms(True)")
    say_row(ROW)
    for deterministic in False, True:
        torch.use_deterministic_algorithms(deterministic)
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        results.add("rows", row | {"deterministic": deterministic})
        say_row(ROW, row)
    if any("error" in row for row in results["rows"]):
        return
    losses, first, different = [], {}, []
    for _ in range(2):
        losses.append(step(model, our_loss, random_tokens(config, S))[1])
        for name, p in model.named_parameters():
            bits = p.grad.flatten().view(torch.uint8)
            if name not in first:
                first[name] = bits.cpu()  # a second set of gradients may not fit the GPU
            elif not torch.equal(bits, first[name].to(DEVICE)):
                different.append(name)
    different += ["loss"] * (losses[0] != losses[1])
    normal, exact = (row["seconds"] for row in results["rows"])
    results.save(different=different, cost=exact / normal - 1)
    verdict = (
        f"NOT equal: {', '.join(different)}"
        if different
        else "loss and every gradient equal to the bit"
    )
    say(f"Two deterministic runs: {verdict}; time {results['cost']:+.1%}")


# ----------------------------------------------------------------------------------------------------------------------


def plot(path, image):
    """Draw tokens per second and peak memory against length, from the results of a run with rows."""
    if not path.exists():
        raise SystemExit(
            f"error: {path} does not exist: run bench.py first, or name its folder by --out"
        )
    from matplotlib.figure import Figure

    results = json.loads(path.read_text())
    rows = [row for row in results["rows"] if "error" not in row]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    if floors := [
        (row["tokens"], row["tokens"] / row["own_floor_seconds"]) for row in rows if "floor" in row
    ]:
        speed.plot(*zip(*floors), color="0.6", linestyle="--", label="floor of what ours computes")
    for axes, title, key in (
        (speed, "tokens per second", "tokens_per_second"),
        (memory, "peak memory, GiB", "peak_gib"),
    ):
        for name, color in ("ours", "tab:blue"), ("transformers", "tab:orange"):
            if points := [
                (row["tokens"], row[key] or math.nan) for row in rows if row["model"] == name
            ]:
                axes.plot(*zip(*points), color=color, marker="o", label=name)
        lengths = sorted({row["tokens"] for row in results["rows"]})
        axes.set(title=title, xlabel="tokens in the sequence", xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [length(S) for S in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(
        f"forward + backward, {results['layers']} layers, {results['machine']['device']}"
    )
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)
    say(f"{image} drawn from {path}")


def parse_rows(text):
    """'16x4K,100' -> [(16, 4096), (1, 100)], sequences and their length"""
    units = {"": 1, "K": K, "M": K * K}
    parts = [
        re.fullmatch(r"(?:([1-9]\d*)X)?([1-9]\d*)([KM]?)", part.strip().upper())
        for part in text.split(",")
    ]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 8K or 4096,16x4K")
    return [(int(part[1] or 1), int(part[2]) * units[part[3]]) for part in parts]


COMMANDS = {  # name: (what it measures in this order, default rows on a GPU, on a CPU)
    "bench": ([ceilings_section, rows_section], "4K,8K,16K,32K,64K,128K", "64,128"),
    "train": ([training_section], "16x4K,32K,64K,128K,256K,512K,1M", "4x32,64"),
    "profile": ([profile_section], "8K", "128"),
    "accuracy": ([accuracy_section], "4K", "64"),
    "deterministic": ([deterministic_section], "8K", "128"),
}


def refuse(parser, message):
    """End with the message, once."""
    if os.environ.get("RANK", "0") == "0":
        parser.error(message)
    raise SystemExit(2)


def measure(options, parser):
    deterministic, ranks = options.deterministic == "true", "RANK" in os.environ
    name = (
        "profile"
        if options.profile
        else "accuracy"
        if options.accuracy
        else "deterministic"
        if deterministic
        else "bench"
    )
    if name != "bench" and (ranks or options.against):
        parser.error(f"--{name} runs on one GPU, without torchrun and without --against")
    name = "train" if ranks else name
    sections, on_gpu, on_cpu = COMMANDS[name]
    options.rows = options.rows or parse_rows(on_gpu if GPU else on_cpu)
    if ranks:
        for sequences, S in options.rows:
            world = int(os.environ["WORLD_SIZE"])
            n = ranks_that_share(options, world, sequences)
            if n < 1 or world % n or S % n or S > K * K:
                refuse(
                    parser,
                    f"{sequences}x{length(S)} at sp={n}: sp must divide the {world} ranks and the length, at most 1M",
                )
            if options.sp is None and sequences % (world // n):
                refuse(
                    parser,
                    f"{sequences}x{length(S)}: the sequences must divide among {world // n} groups of ranks",
                )
    if any(S < 2 for _, S in options.rows):
        refuse(
            parser, "--rows: sequences have 2 tokens or more, because the last one has no target"
        )
    if options.keep_blocks is not None and options.keep_blocks < 0:
        refuse(parser, f"--keep_blocks={options.keep_blocks}: 0 or more")
    if not ranks:
        if any(sequences > 1 for sequences, _ in options.rows):
            parser.error("--rows: several sequences are for training: start bench.py by torchrun")
        options.rows = [S for _, S in options.rows]
    config = GPTOSSConfig() if GPU else TINY
    layers = (
        options.layers
        if options.layers is not None
        else 2
        if name == "accuracy"
        else config.num_hidden_layers
    )
    try:
        config = replace(config, num_hidden_layers=layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if GPU and ranks:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    results = Results(
        options.out / f"{name}.json", machine=machine(), layers=layers, ceilings=[], rows=[]
    )
    known = results["machine"]
    say(
        ", ".join(
            f"{value}" if name in ("device", "dtype", "date") else f"{name} {value}"
            for name, value in known.items()
        )
    )
    say(f"gpt-oss-20b's sizes, {layers} layers, random weights and tokens" if GPU else
        f"no GPU: a tiny model of {layers} layers shows what this does, and its speeds mean nothing")  # fmt: skip
    for section in sections:
        section(options, config, results)
    say(f"\nresults: {results.path}")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--rows",
        type=parse_rows,
        metavar="8K,16x4K",
        help="lengths; under torchrun also numbers of sequences; default: all above",
    )
    add(
        "--layers",
        type=int,
        metavar="N",
        help="layers of the model; default the 20b's 24, for --accuracy 2",
    )
    add("--recompute", choices=["auto", "none", "attention", "all"], default="auto",
        help="auto: the least that fits; under torchrun that which should, by memory.estimate")  # fmt: skip
    add(
        "--keep_blocks",
        type=int,
        metavar="N",
        help="torchrun: last blocks that recompute nothing; default as many as should fit",
    )
    add("--against", choices=["transformers"], help="measure it on the same rows, after ours")
    add(
        "--sp",
        type=int,
        metavar="N",
        help="torchrun: ranks that share a sequence; default all if there is only one",
    )
    add(
        "--optimizer",
        choices=["fp32", "split", "bf16"],
        default="split",
        help="torchrun: as in train.py",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/bench"),
        metavar="DIR",
        help="where results go, as JSON; default runs/bench",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add(
        "--profile",
        action="store_true",
        help="where the time of one step goes, by room and kernel, and a trace",
    )
    add(
        "--accuracy", action="store_true", help="error of bf16 against fp32, ours and transformers'"
    )
    add(
        "--deterministic",
        choices=["true", "false"],
        default="false",
        help="run a row twice; compare to the bit; state the cost",
    )
    add(
        "--plot",
        type=Path,
        nargs="?",
        const=Path("docs/bench.png"),
        metavar="PNG",
        help="draw DIR/bench.json as docs/bench.png",
    )
    options = parser.parse_args(arguments)
    try:
        plot(options.out / "bench.json", options.plot) if options.plot else measure(options, parser)
    except torch.OutOfMemoryError:
        raise SystemExit(
            "error: this GPU is too small for this: give fewer --layers, or shorter --rows"
        ) from None
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install {error.name}") from None


if __name__ == "__main__":
    main()
