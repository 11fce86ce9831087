"""Where the time of one step goes: by part of the model and of training, by kernel, and as a trace.

Every piece of time belongs to the innermost labelled part around it; that of the backward belongs
to the part of the forward operation it differentiates."""

import functools
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import model as gptoss
from bench.common import GPU, random_tokens, synchronize
from bench.report import say, say_row
from bench.speed import ROW, build_ours, our_loss, rows_of, step
from loop.log import Log

PART = "part: "
ATTENTION, PROJECTIONS, EXPERTS, LOSS, REST = (
    PART + name
    for name in (
        "attention",
        "projections",
        "experts and router",
        "loss",
        "norms, rotary, residuals and the rest",
    )
)
GATHER, PLACE, REDUCE, CLIP, OPTIMIZER = (
    PART + name
    for name in (
        "weights: gathered",
        "weights: copied from what was gathered",
        "gradients: copied, exchanged, added up",
        "gradients: norm and clipping",
        "optimizer",
    )
)
LABELS = {  # how labels of PyTorch's own begin: the part
    "FSDP::all_gather_copy_out": PLACE,
    "FSDP::all_gather": GATHER,
    "FSDP::post_backward_reduce": REDUCE,
    "Optimizer.": OPTIMIZER,
}


def labelled(part, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(part):
            return function(*args, **kwargs)

    return call


def label_modules(model):
    for block in model.blocks:
        block.forward = labelled(REST, block.forward)
        block.mlp.forward = labelled(EXPERTS, block.mlp.forward)
        for projection in block.attention.qkv, block.attention.out:
            projection.forward = labelled(PROJECTIONS, projection.forward)
    return model


def label_functions():
    """A context in which attention and the loss are labelled."""
    choose = gptoss.choose_attention
    return patch.multiple(
        gptoss,
        choose_attention=lambda *args: labelled(ATTENTION, choose(*args)),
        mean_loss=labelled(LOSS, gptoss.mean_loss),
    )


def part_of(label):
    if label.startswith(PART):
        return label
    return next((part for begin, part in LABELS.items() if label.startswith(begin)), None)


def time_by_part(events):
    """({part: ms}, [(kernel, ms, count)]) of the profiler's events: the GPU's kernels, or on a CPU
    the operations."""
    # (thread, sequence number) -> the forward operation that made this node of the backward graph.
    # Events of the backward name the thread of their forward. Of several operations with one number
    # the last made the node, and stays.
    numbered = sorted(
        (e for e in events if e.sequence_nr >= 0 and not e.fwd_thread),
        key=lambda e: e.time_range.start,
    )
    forward = {(e.thread, e.sequence_nr): e for e in numbered}
    annotations = {e.name for e in events if e.is_user_annotation}  # on the GPU they span kernels

    def part(event):
        while event is not None:
            if named := part_of(event.name):
                return named
            found = None
            if event.fwd_thread:
                found = forward.get((event.fwd_thread, event.sequence_nr))
            # strictly earlier, or this may not end
            earlier = found is not None and found.time_range.start < event.time_range.start
            event = found if earlier else event.cpu_parent
        return REST

    parts, kernels = defaultdict(float), defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        pieces = [(event.name, event.self_cpu_time_total)]
        if GPU:
            pieces = [(k.name, k.duration) for k in event.kernels if k.name not in annotations]
        for name, microseconds in pieces:
            parts[part(event)] += microseconds / 1e3
            kernels[name][0] += microseconds / 1e3
            kernels[name][1] += 1
    longest = sorted(kernels.items(), key=lambda kernel: -kernel[1][0])
    return dict(parts), [(name, ms, count) for name, (ms, count) in longest]


def new_profiler():
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * GPU)


@contextmanager
def profiled_step(train, number):
    """A profiler that is on while the module `train` makes its step `number`, counted from 1, and
    a list that gets the seconds of every step."""
    profiler, begin, end, seconds = new_profiler(), Log.begin, Log.step, []
    running = ExitStack()  # holds the profiler while it is on, also if the step fails

    def begin_step(log):
        synchronize()
        if len(seconds) + 1 == number:
            running.enter_context(profiler)
        begin(log)

    def end_step(log, *args, **values):
        end(log, *args, **values)  # waits for the GPU
        seconds.append(time.perf_counter() - log.began)
        if len(seconds) == number:
            running.close()

    build = train.build_model
    labels = patch.multiple(
        train,
        build_model=lambda *args: label_modules(build(*args)),
        gradient_norm_squared=labelled(CLIP, train.gradient_norm_squared),
        scale_gradients_=labelled(CLIP, train.scale_gradients_),
    )
    steps = patch.multiple(Log, begin=begin_step, step=end_step)
    with label_functions(), labels, steps, running:
        yield profiler, seconds


def show(profiler, elapsed, trace, moved=None):
    """Print and return {part: ms} and the longest kernels. moved: {part: bytes that it reads and
    writes}, where they can be counted."""
    profiler.export_chrome_trace(str(trace))
    parts, kernels = time_by_part(profiler.events())
    total, moved = sum(parts.values()), moved or {}
    device = "GPU" if GPU else "CPU"
    say(f"\nWith the profiler {elapsed * 1e3:.1f} ms, of which the {device} works {total:.1f} ms:")
    for name, ms in sorted(parts.items(), key=lambda item: -item[1]):
        line = f"{ms:>12.2f} ms{ms / total:>7.1%}{'':>6}  {name.removeprefix(PART)}"
        if name in moved:
            line += f": {moved[name] / 1e9:.3g} GB, {moved[name] / ms / 1e9:.3g} TB/s"
        say(line)
    say("\nthe kernels that take longest:")
    for name, ms, count in kernels[:20]:
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}{count:>6}  {name[:100]}")
    say(f"\n{trace}: open it in https://ui.perfetto.dev")
    return {"parts_ms": parts, "kernels": kernels[:20]}


def section(options, config, results):
    S, model = options.rows[0], label_modules(build_ours(config))
    with label_functions():
        say("\nThe step, without the profiler")
        say_row(ROW)
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        results.add("rows", row)
        say_row(ROW, row)
        if "error" in row:
            return
        with new_profiler() as profiler:
            elapsed, _ = step(model, our_loss, random_tokens(config, S))
    results.save(**show(profiler, elapsed, options.out / "trace.json.gz"))
