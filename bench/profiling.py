"""Where the time of one step goes: by part of the model, by kernel, and as a trace.

Every piece of time belongs to the innermost labelled part around it; that of the backward belongs
to the part of the forward operation it differentiates."""

import functools
from collections import defaultdict
from unittest.mock import patch

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import model as gptoss
from bench.common import GPU, random_tokens
from bench.report import say, say_row
from bench.speed import ROW, build_ours, our_loss, rows_of, step

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


def labelled(part, function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        with record_function(part):
            return function(*args, **kwargs)

    return call


def label_parts(model):
    """A context in which what the model does is labelled."""
    for block in model.blocks:
        block.forward = labelled(REST, block.forward)
        block.mlp.forward = labelled(EXPERTS, block.mlp.forward)
        for projection in block.attention.qkv, block.attention.out:
            projection.forward = labelled(PROJECTIONS, projection.forward)
    choose = gptoss.choose_attention
    return patch.multiple(
        gptoss,
        choose_attention=lambda *args: labelled(ATTENTION, choose(*args)),
        mean_loss=labelled(LOSS, gptoss.mean_loss),
    )


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
            if event.name.startswith(PART):
                return event.name
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


def section(options, config, results):
    S, model = options.rows[0], build_ours(config)
    with label_parts(model):
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
    parts, kernels = time_by_part(profiler.events())
    total = sum(parts.values())
    results.save(parts_ms=parts, kernels=kernels[:20])
    device = "GPU" if GPU else "CPU"
    say(f"\nWith the profiler {elapsed * 1e3:.1f} ms, of which the {device} works {total:.1f} ms:")
    for name, ms in sorted(parts.items(), key=lambda item: -item[1]):
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}{'':>6}  {name.removeprefix(PART)}")
    say("\nthe kernels that take longest:")
    for name, ms, count in kernels[:20]:
        say(f"{ms:>12.2f} ms{ms / total:>7.1%}{count:>6}  {name[:100]}")
    say(f"\n{trace}: open it in https://ui.perfetto.dev")
