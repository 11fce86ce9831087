"""How fast, how large, how exact: the measurements behind the README's tables and plot, each by one command.

    python bench.py                                   # forward + backward of the 20b at 4K … 128K tokens, beside its ceilings
    python bench.py --against=transformers            # and transformers on the same rows
    python bench.py --profile --rows=32K              # where the GPU time of one step goes; a trace for ui.perfetto.dev
    python bench.py --accuracy                        # bf16 error of ours and of transformers, against fp32
    python bench.py --deterministic=true              # are two runs equal to the bit, and what does that cost
    python bench.py --plot                            # docs/bench.png from what an earlier run wrote

It needs no download: weights and tokens are random. `--layers=4` fits a small card; without a GPU a tiny model stands in.
Every row prints as soon as it is known, and a row that fails (out of memory) says so and lets the next one run.

What the words mean. FLOPs are model FLOPs: nothing recomputed, active experts only, only keys that attention may see; for an
attention kernel alone, a backward counts 2.5 forwards, because it makes the scores again. A ceiling is the rate of one kernel
by itself. The composed floor of a row is the time of its step if every matmul and attention ran at its ceiling and nothing
else took any time: `floor` below says what it counts.

References: model FLOPs, https://arxiv.org/abs/2204.02311; the count of 2.5, https://arxiv.org/abs/2307.08691.
"""

import argparse
import copy
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import re
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

import model as gptoss
from model import GPTOSS, IGNORED, GPTOSSConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16
K, GIB = 1024, 2**30
LONG = 64 * K  # from here on a step takes seconds: timed once, and attention's rate no longer changes
TINY = GPTOSSConfig(
    num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=512, hidden_size=64, intermediate_size=64,
    head_dim=16, num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
)  # fmt: skip

say = functools.partial(print, flush=True)

# ----------------------------------------------------------------------------------------------------------------------
# Clocks, failures, files


def synchronize():
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run, prepare=tuple, repetitions=5):
    """Median time of run(*prepare()), of run alone, after one call that does not count.

    Before each call the GPU overwrites a GiB: its caches then hold nothing of use, and Python has time to queue the call."""
    times = []
    scratch = torch.empty(GIB if DEVICE.type == "cuda" else 0, dtype=torch.uint8, device=DEVICE)
    for _ in range(repetitions + 1):
        arguments = prepare()
        if DEVICE.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
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


def release():
    """Give the GPU back what nothing refers to any more."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def attempt(run):
    """run(), a dict; if it fails {"error": why, in one line}. Either way no memory of it stays behind."""
    try:
        return run()
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return {"error": "out of memory"}
        return {"error": f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"}
    finally:
        release()


def save(results, path):
    """Write JSON aside, then rename: a run that is stopped leaves what it knew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    partial.write_text(json.dumps(results, indent=2) + "\n")
    partial.rename(path)


def length(tokens):
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def machine():
    gpu = torch.cuda.get_device_properties(DEVICE) if DEVICE.type == "cuda" else None
    return {
        "device": f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" if gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Ceilings and the floor that they make


def matrices(config):
    """{name: (rows a token brings, inputs, outputs)} of the matmuls that matter; the router's is a thousandth of them."""
    C, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
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
    flops = {name: layers * S * rows * 2 * ins * outs for name, (rows, ins, outs) in matrices(config).items()}
    flops["unembedding"] /= layers
    windows = [config.window(layer) for layer in range(layers)]
    for name, window in ("causal", None), ("window", config.sliding_window):
        flops[name] = windows.count(window) * attention_flops(config, S, window)
    return flops


def backward_flops(name, forward):
    return forward * (2.5 if name in ("causal", "window") else 2)


def floor(config, S, recompute, rates):
    """{name: seconds} of a step over S tokens at rates[name]["forward" or "backward"] TFLOP/s: the composed floor.

    Counted: every large matmul forward and backward, with the qkv, out and gate_up matmuls a second time forward if blocks
    are recomputed (whatever is kept, the backward needs their results again); attention once forward, once backward; the
    unembedding once forward, once backward. Not counted: the router, bias gradients, and everything that is no matmul."""
    times = {}
    for name, flops in forward_flops(config, S).items():
        forwards = 2 if recompute != "none" and name in ("qkv", "out", "gate_up") else 1
        rate = rates[name]
        times[name] = (forwards * flops / rate["forward"] + backward_flops(name, flops) / rate["backward"]) / 1e12
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
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)  # not zeros: those cost less power, and run faster


def matmul_kernels(rows, ins, outs, experts=None):
    """Forward and backward of x (rows, ins) @ W^T, W (outs, ins); with experts of x @ W (experts, ins, outs) in equal shares."""
    x, g = random(rows, ins), random(rows, outs)
    if experts is None:
        w = random(outs, ins)
        return lambda: x @ w.t(), lambda: (g @ w, g.t() @ x)
    w, ends = random(experts, ins, outs), torch.arange(1, experts + 1, device=DEVICE, dtype=torch.int32) * (rows // experts)
    backward = lambda: (F.grouped_mm(g, w.transpose(1, 2), offs=ends), F.grouped_mm(x.t(), g, offs=ends))  # noqa: E731
    return lambda: F.grouped_mm(x, w, offs=ends), backward


def attention_kernels(config, S):
    """[(name, which kernel, window, attention(q, k, v, sinks))] of those that can run here."""
    D, window = config.head_dim, config.sliding_window
    if DEVICE.type == "cpu":
        dense = gptoss.dense_attention
        return [("causal", "dense", None, dense), ("window", "dense", window, functools.partial(dense, window=window))]
    masks = {w: gptoss.block_mask(S, w, None, DEVICE) for w in (None, window)}
    flex = {w: functools.partial(gptoss.flex_sink_attention, mask=mask) for w, mask in masks.items()}
    kernels = [("causal", "Flex", None, flex[None]), ("window", "Flex", window, flex[window])]
    if gptoss.cudnn_refuses(DEVICE, DTYPE, D) is None:
        kernels.insert(0, ("causal", "cuDNN", None, gptoss.CudnnSinkAttention.apply))
    return kernels


def measure_kernels(flops, name, forward, backward, prepare=tuple):
    """Rates of a pair of kernels. `prepare` makes what the backward is called with, and is not timed."""
    ways = {"forward": (flops, seconds(forward)), "backward": (backward_flops(name, flops), seconds(backward, prepare))}
    return {way: count / s / 1e12 for way, (count, s) in ways.items()} | {f"{way}_ms": s * 1e3 for way, (_, s) in ways.items()}


def measure_matmul(config, name):
    size, tokens = (8192, 32 * K) if DEVICE.type == "cuda" else (128, 64)
    rows, ins, outs = matrices(config).get(name, (1, size, size))
    rows *= {"matmul": size, "unembedding": tokens // 8}.get(name, tokens)  # 32K rows of logits would take 12 GiB
    experts = config.num_experts if name in ("gate_up", "down") else None
    return measure_kernels(2 * rows * ins * outs, name, *matmul_kernels(rows, ins, outs, experts))


def measure_attention(config, name, S, window, attend):
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inputs = [random(1, S, h, D).requires_grad_() for h in (heads, kv_heads, kv_heads)] + [random(heads).requires_grad_()]
    g = random(1, S, heads, D)
    torch._dynamo.reset()  # each length compiled for itself, as in the model
    return measure_kernels(
        attention_flops(config, S, window),
        name,
        forward=lambda: attend(*inputs),
        backward=lambda out: torch.autograd.grad(out, inputs, g),
        prepare=lambda: (attend(*inputs),),
    )


def ceilings_section(config, options, results, write):
    say(f"\n{'Ceilings':40}{'forward: ms':>12}{'TFLOP/s':>10}{'backward: ms':>14}{'TFLOP/s':>10}")

    def record(label, known, measure, *arguments):
        ceiling = known | attempt(functools.partial(measure, config, known["name"], *arguments))
        results["ceilings"].append(ceiling)
        write()
        if "error" in ceiling:
            return say(f"{label:40}  {ceiling['error']}")
        say(f"{label:40}{ceiling['forward_ms']:>12.2f}{ceiling['forward']:>10.4g}", end="")
        say(f"{ceiling['backward_ms']:>14.2f}{ceiling['backward']:>10.4g}")

    record("matmul, square", {"name": "matmul", "tokens": None}, measure_matmul)
    for name, (_, ins, outs) in matrices(config).items():
        record(f"{name}, {ins} -> {outs}", {"name": name, "tokens": None}, measure_matmul)
    for S in sorted({min(S, LONG) for S in options.rows}):
        for name, kernel, window, attend in attention_kernels(config, S):
            label = f"attention {length(S)}, {f'window {window}' if window else 'causal'}, {kernel}"
            record(label, {"name": name, "tokens": S, "kernel": kernel}, measure_attention, S, window, attend)


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
    try:
        import transformers
    except ImportError:
        raise SystemExit("error: this compares with transformers: pip install transformers") from None
    from convert_hf import hf_config

    transformers.logging.set_verbosity_error()
    with DEVICE:
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.GptOssConfig.from_dict(hf_config(config, DTYPE, False, {})),
            dtype=DTYPE,
            attn_implementation="flex_attention" if DEVICE.type == "cuda" else "eager",  # its flex has no sinks on a CPU
            experts_implementation="grouped_mm",
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # older name
    enable()
    return model.train()


def following(tokens):
    """The targets of `tokens`, as transformers makes them from its labels: the last token has none."""
    return F.pad(tokens[:, 1:], (0, 1), value=IGNORED)


def our_loss(model, tokens):
    return model(tokens, following(tokens))


def their_loss(model, tokens):
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def random_tokens(config, S):
    return torch.randint(config.vocab_size, (1, S), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))


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


def measure_row(config, model, loss_of, S):
    """The first step compiles; then the median of three more, or one more that takes seconds."""
    gpu, tokens = DEVICE.type == "cuda", random_tokens(config, S)
    if gpu:
        gptoss.cudnn_refuses(DEVICE, DTYPE, config.head_dim)  # now, because its trial run compiles for other sizes than ours
    torch._dynamo.reset()  # so that this length is compiled for itself, not for any length
    try:
        first, _ = step(model, loss_of, tokens)
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        steady = statistics.median(step(model, loss_of, tokens)[0] for _ in range(1 if S >= LONG else 3))
    finally:
        model.zero_grad(set_to_none=True)
    return {
        "seconds": steady,
        "compile_seconds": max(first - steady, 0),
        "tokens_per_second": S / steady,
        "tflops": config.flops_per_token(S) * S / steady / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / GIB if gpu else None,
    }


def rows_of(name, model, config, rows, recompute):
    """Yield a row for each length. recompute "auto": the least that fits; what ran out of memory is not tried at more tokens."""
    modes = ["none", "attention", "all"] if recompute == "auto" else [recompute]
    loss_of = our_loss if name == "ours" else their_loss
    torch._dynamo.config.fail_on_recompile_limit_hit = name == "ours"  # or Flex would fall back to S x S scores in silence
    for S in sorted(rows):
        while True:
            if name == "ours":
                model.recompute = modes[0]
            row = {"model": name, "tokens": S, "recompute": modes[0]}
            row |= attempt(functools.partial(measure_row, config, model, loss_of, S))
            if row.get("error") != "out of memory" or len(modes) == 1:
                break
            say(f"({length(S)} with recompute={modes.pop(0)}: out of memory)")
        yield row


def say_row_header(title):
    say(f"\n{title}\n{'model':14}{'tokens':>7}{'recompute':>11}{'tok/s':>10}{'TFLOP/s':>10}", end="")
    say(f"{'of matmul':>11}{'x floor':>9}{'peak GiB':>10}{'compile s':>11}")


def say_row(row):
    head = f"{row['model']:14}{length(row['tokens']):>7}{row['recompute']:>11}"
    if "error" in row:
        return say(f"{head}  {row['error']}")

    def known(name, form):
        return format(row[name], form) if row.get(name) is not None else "-"

    say(f"{head}{row['tokens_per_second']:>10,.0f}{row['tflops']:>10.4g}{known('share_of_matmul', '.0%'):>11}", end="")
    say(f"{known('distance', '.2f'):>9}{known('peak_gib', '.1f'):>10}{row['compile_seconds']:>11.1f}", end="")
    say(f"   ours: {row['ours_faster']:.2f} x" if "ours_faster" in row else "")


def compare_row(config, row, results):
    """Add to a row how it stands to the ceilings, to the floor, and to ours of the same length."""
    rates = best_rates(results["ceilings"], row["tokens"])
    if "matmul" in rates:
        row["share_of_matmul"] = row["tflops"] / rates["matmul"]["forward"]
    if row["model"] == "ours" and forward_flops(config, 1).keys() <= rates.keys():
        row["floor"] = floor(config, row["tokens"], row["recompute"], rates)
        row["distance"] = row["seconds"] / sum(row["floor"].values())
    for other in results["rows"]:
        if row["model"] != "ours" and other["tokens"] == row["tokens"] and "seconds" in other:
            row["ours_faster"] = row["seconds"] / other["seconds"]


def rows_section(config, options, results, write):
    def run(name, model, recompute):
        for row in rows_of(name, model, config, options.rows, recompute):
            if "error" not in row:
                compare_row(config, row, results)
            results["rows"].append(row)
            write()
            say_row(row)

    say_row_header("Forward + backward")
    run("ours", build_ours(config), options.recompute)
    floors = [row for row in results["rows"] if "floor" in row]
    if floors:
        say(f"\n{'Composed floor, s':21}{'step':>10}{'floor':>10}" + "".join(f"{name:>12}" for name in floors[0]["floor"]))
    for row in floors:
        parts = row["floor"].values()
        say(f"{length(row['tokens']):>21}{row['seconds']:>10.4f}{sum(parts):>10.4f}" + "".join(f"{part:>12.4f}" for part in parts))
    release()
    if options.against:
        theirs = build_theirs(config)
        version, attention = importlib.metadata.version("transformers"), theirs.config._attn_implementation
        results["machine"]["transformers"] = version
        say_row_header(f"transformers {version}: {attention}, grouped_mm experts, gradient checkpointing")
        run("transformers", theirs, "all")


# ----------------------------------------------------------------------------------------------------------------------
# Profile: where the time of one step goes. Every piece of time belongs to the innermost room around it; what the backward
# does, to the room of the forward operation that it undoes.

ROOM = "room: "
ATTENTION, PROJECTIONS, EXPERTS, LOSS = (ROOM + name for name in ("attention", "projections", "experts and router", "loss"))
REST = ROOM + "norms, rotary, residuals and the rest"


def in_room(room, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(room):
            return function(*args, **kwargs)

    return call


def label_rooms(model, choose_attention):
    for block in model.blocks:
        block.forward = in_room(REST, block.forward)
        block.mlp.forward = in_room(EXPERTS, block.mlp.forward)
        for projection in block.attention.qkv, block.attention.out:
            projection.forward = in_room(PROJECTIONS, projection.forward)
    gptoss.choose_attention = lambda *args, **kwargs: in_room(ATTENTION, choose_attention(*args, **kwargs))


def time_by_room(events):
    """({room: ms}, [(kernel, ms, count)]) of the profiler's events: of the GPU's kernels, or on a CPU of the operations."""
    # (thread, sequence number) -> the forward operation that made this node of the backward graph. Events of the backward
    # name the thread of their forward. Of several operations with one number the last made the node, and stays.
    numbered = sorted((e for e in events if e.sequence_nr >= 0 and not e.fwd_thread), key=lambda e: e.time_range.start)
    forward = {(e.thread, e.sequence_nr): e for e in numbered}
    annotations = {e.name for e in events if getattr(e, "is_user_annotation", False)}  # on the GPU they span kernels

    def room(event):
        while event is not None:
            if event.name.startswith(ROOM) or event.name == "CrossEntropy":
                return LOSS if event.name == "CrossEntropy" else event.name
            undone = forward.get((event.fwd_thread, event.sequence_nr)) if event.fwd_thread else None
            earlier = undone is not None and undone.time_range.start < event.time_range.start  # surely, or this may not end
            event = undone if earlier else event.cpu_parent
        return REST

    rooms, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        pieces = [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name not in annotations]
        if DEVICE.type == "cpu":
            pieces = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in pieces:
            rooms[room(event)] += microseconds / 1e3
            kernels[name][0] += microseconds / 1e3
            kernels[name][1] += 1
    return dict(rooms), sorted(((name, ms, n) for name, (ms, n) in kernels.items()), key=lambda kernel: -kernel[1])


def profile_section(config, options, results, write):
    S, model, choose_attention, gpu = options.rows[0], build_ours(config), gptoss.choose_attention, DEVICE.type == "cuda"
    label_rooms(model, choose_attention)
    try:
        say_row_header("The step, without the profiler")
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        say_row(row)
        results["rows"].append(row)
        if "error" in row:
            return
        with torch_profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
            elapsed, _ = step(model, our_loss, random_tokens(config, S))
    finally:
        gptoss.choose_attention = choose_attention
        write()
    trace = options.out / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    rooms, kernels = time_by_room(profiler.events())
    total = sum(rooms.values())
    results |= {"rooms_ms": rooms, "kernels": kernels[:20]}
    write()
    say(f"\nWith the profiler {elapsed * 1e3:.1f} ms, of which the {'GPU' if gpu else 'CPU'} works {total:.1f} ms:")
    for room, ms in sorted(rooms.items(), key=lambda item: -item[1]):
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}  {room.removeprefix(ROOM)}")
    say("\nWhat takes longest")
    for name, ms, count in kernels[:20]:
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}{count:>6} x  {name[:100]}")
    say(f"\n{trace}: open it in https://ui.perfetto.dev")


# ----------------------------------------------------------------------------------------------------------------------
# Accuracy: how far bf16 is from fp32 with the same weights, for us and for transformers


def group(name):
    """blocks.3.attention.qkv.bias -> qkv: one name for all layers, weights and biases."""
    return re.sub(r"blocks\.\d+\.(attention\.|mlp\.)?|[._](weight|bias)$", "", name)


def relative_errors(measured, truth):
    """{group: |measured - truth| / |truth|} of two {name: tensor}, with the names of a group as one long vector."""
    error, norm = defaultdict(float), defaultdict(float)
    for name, t in truth.items():
        error[group(name)] += (measured[name].float() - t.float()).square().sum(dtype=torch.float64).item()
        norm[group(name)] += t.float().square().sum(dtype=torch.float64).item()
    return {name: math.sqrt(error[name] / norm[name]) if norm[name] else math.nan for name in norm}


def outputs(model, logits_of, loss_of, tokens):
    """{"logits" or parameter name: logits or gradient} of a model."""
    torch._dynamo.reset()  # two dtypes, with gradient and without: together they could pass the recompile limit
    model.zero_grad(set_to_none=True)
    with torch.no_grad():
        logits = logits_of(model, tokens)
    loss_of(model, tokens).backward()
    return {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}


def accuracy_section(config, options, results, write):
    from convert_hf import HUGGING_FACE, counterparts

    S = options.rows[0]
    tokens, ours = random_tokens(config, S), build_ours(config)
    with torch.no_grad():  # as initialised these are zero, and would hide what is wrong with them
        for name, p in ours.named_parameters():
            if name.endswith(("bias", "sinks")):
                p.normal_(0, 1 if name.endswith("sinks") else 0.02)
    truth = outputs(copy.deepcopy(ours).float(), lambda m, t: m(t), our_loss, tokens)
    errors = {"ours": relative_errors(outputs(ours, lambda m, t: m(t), our_loss, tokens), truth)}
    pairs, theirs = counterparts(config, HUGGING_FACE, False), build_theirs(config)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for pair, p in zip(pairs, ours.parameters()):
            values = pair.to_theirs(p)
            for name, value in zip(pair.theirs, (values,) if isinstance(values, torch.Tensor) else values):
                parameters[name].copy_(value)
    del ours
    release()
    found = outputs(theirs, lambda m, t: m(input_ids=t, use_cache=False).logits, their_loss, tokens)
    renamed = {pair.name: pair.to_ours(*(found[name] for name in pair.theirs)) for pair in pairs}
    errors["transformers"] = relative_errors(renamed | {"logits": found["logits"]}, truth)

    results |= {"tokens": S, "truth": "ours in float32", "errors": errors}
    write()
    say(f"\nRelative error at {length(S)} of {results['machine']['dtype']} against float32, which is our model in float32 with")
    say(f"the same weights. Logits, and the gradient of\n{'':16}{'ours':>12}{'transformers':>14}{'ratio':>8}")
    for name, error in errors["ours"].items():
        theirs = errors["transformers"][name]
        say(f"{name:16}{error:>12.2e}{theirs:>14.2e}{error / theirs:>8.2f}")
    worst = max(error / errors["transformers"][name] for name, error in errors["ours"].items())
    say(f"Largest ratio {worst:.2f}: ours is {'nowhere' if worst <= 1 else 'somewhere'} less exact")


# ----------------------------------------------------------------------------------------------------------------------
# Determinism: is a step the same to the bit when it is done again, and what that costs


def deterministic_section(config, options, results, write):
    S, model = options.rows[0], build_ours(config)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would fill every new tensor, to no use here
    say_row_header("Forward + backward, then the same with torch.use_deterministic_algorithms(True)")
    for deterministic in False, True:
        torch.use_deterministic_algorithms(deterministic)
        gptoss.cudnn_refuses.cache_clear()  # its answer depends on the mode
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        results["rows"].append(row | {"deterministic": deterministic})
        write()
        say_row(row)
    if any("error" in row for row in results["rows"]):
        return

    def run():
        _, loss = step(model, our_loss, random_tokens(config, S))
        return loss, {name: p.grad.flatten().view(torch.uint8) for name, p in model.named_parameters()}

    loss, gradients = run()
    gradients = {name: bits.cpu() for name, bits in gradients.items()}  # a second set of them may not fit the GPU
    again, others = run()
    different = ["loss"] * (loss != again)
    different += [name for name, bits in others.items() if not torch.equal(bits, gradients[name].to(DEVICE))]
    normal, exact = (row["seconds"] for row in results["rows"])
    results |= {"different": different, "cost": exact / normal - 1}
    write()
    verdict = f"NOT equal: {', '.join(different)}" if different else "loss and every gradient equal to the bit"
    say(f"Two deterministic runs: {verdict}; time {results['cost']:+.1%}")


# ----------------------------------------------------------------------------------------------------------------------


def plot(path, image):
    """Draw tokens per second and peak memory against length, from the results of a run with rows."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: --plot draws with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        results = json.loads(path.read_text())
    except OSError:
        raise SystemExit(f"error: {path} cannot be read: run bench.py first, or name its folder by --out") from None
    rows = [row for row in results["rows"] if "error" not in row]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    floors = [(row["tokens"], row["tokens"] / sum(row["floor"].values())) for row in rows if "floor" in row]
    if floors:
        speed.plot(*zip(*floors), color="0.6", linestyle="--", label="composed floor of ours")
    for name, color in ("ours", "tab:blue"), ("transformers", "tab:orange"):
        mine = [row for row in rows if row["model"] == name]
        if mine:
            lengths = [row["tokens"] for row in mine]
            speed.plot(lengths, [row["tokens_per_second"] for row in mine], color=color, marker="o", label=name)
            memory.plot(lengths, [row["peak_gib"] or math.nan for row in mine], color=color, marker="o", label=name)
    for axes, title in (speed, "tokens per second"), (memory, "peak memory, GiB"):
        lengths = sorted({row["tokens"] for row in results["rows"]})
        axes.set(title=title, xlabel="tokens in the sequence", xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [length(S) for S in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"forward + backward, {results['layers']} layers, {results['machine']['device']}")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)
    say(f"{image} drawn from {path}")


def parse_rows(text):
    """'4K,100' -> [4096, 100]"""
    units = {"": 1, "K": K, "M": K * K}
    parts = [re.fullmatch(r"([1-9]\d*)([KM]?)", part.strip().upper()) for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 8K or 4096,32K")
    return [int(part[1]) * units[part[2]] for part in parts]


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=parse_rows, metavar="4K,8K", help="sequence lengths; default 4K to 128K, or one that suits the option below")
    add("--layers", type=int, metavar="N", help="layers of the model; default the 20b's 24, for --accuracy 2")
    add("--recompute", choices=["auto", "none", "attention", "all"], default="auto", help="auto: the least that fits the GPU")
    add("--against", choices=["transformers"], help="measure it on the same rows, after ours")
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="where results go, as JSON; default runs/bench")
    what = parser.add_mutually_exclusive_group()
    add = what.add_argument
    add("--profile", action="store_true", help="where the time of one step goes, by room and kernel, and a trace")
    add("--accuracy", action="store_true", help="error of bf16 against fp32, ours and transformers'")
    add("--deterministic", choices=["true", "false"], default="false", help="run a row twice; compare to the bit; state the cost")
    add("--plot", type=Path, nargs="?", const=Path("docs/bench.png"), metavar="PNG", help="draw DIR/bench.json as docs/bench.png")
    options = parser.parse_args(arguments)
    if options.plot:
        return plot(options.out / "bench.json", options.plot)

    deterministic = options.deterministic == "true"
    name = "profile" if options.profile else "accuracy" if options.accuracy else "deterministic" if deterministic else "bench"
    if options.against and name != "bench":
        parser.error(f"--against belongs to the plain rows: leave out --{name}")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    gpu = DEVICE.type == "cuda"
    lengths = {"bench": "4K,8K,16K,32K,64K,128K" if gpu else "64,128", "accuracy": "4K" if gpu else "64"}
    options.rows = options.rows or parse_rows(lengths.get(name, "8K" if gpu else "128"))
    config = GPTOSSConfig() if gpu else TINY
    layers = 2 if name == "accuracy" else config.num_hidden_layers
    try:
        config = replace(config, num_hidden_layers=layers if options.layers is None else options.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")

    results = {"machine": machine(), "layers": config.num_hidden_layers, "ceilings": [], "rows": []}
    path = options.out / f"{name}.json"
    write = functools.partial(save, results, path)
    write()
    known = results["machine"]
    say(", ".join(f"{value}" if name in ("device", "dtype", "date") else f"{name} {value}" for name, value in known.items()))
    if gpu:
        say(f"gpt-oss-20b's sizes, {config.num_hidden_layers} layers, random weights, one sequence of random tokens, no optimizer")
    else:
        say(f"no GPU: a tiny model of {config.num_hidden_layers} layers shows what this does, and its speeds mean nothing")
    sections = {
        "bench": (ceilings_section, rows_section),
        "profile": (profile_section,),
        "accuracy": (accuracy_section,),
        "deterministic": (deterministic_section,),
    }
    try:
        for section in sections[name]:
            section(config, options, results, write)
    except torch.OutOfMemoryError:
        raise SystemExit(f"error: {known['device']} is too small for this: give fewer --layers, or shorter --rows") from None
    say(f"\nresults: {path}")


if __name__ == "__main__":
    main()
