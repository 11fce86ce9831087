"""Ceilings, the rates of single kernels, and the floor that they set for a step.

The composed floor is the time of a step if every matmul and attention ran at its ceiling in the
same run and everything else were free: attention once forward; qkv, out, gate_up and down twice,
because a block is recomputed; the unembedding once, because its gradient is made in the forward;
all of them once backward. This floor ignores what a row recomputes; the row's own floor counts
exactly what it does. The router, a thousandth of the matmuls, is left out."""

import functools
from collections import defaultdict

import torch
import torch.nn.functional as F

import flash
import model as gptoss
from bench.common import DEVICE, DTYPE, GPU, LONG, K, attempt, random, seconds
from bench.report import length, say_row
from loop.budget import attention_flops, backward_forwards, forward_flops, matrices

EXPERTS = "gate_up", "down"
MATRICES = "qkv", "out", *EXPERTS, "unembedding"
OPERATIONS = *MATRICES, "causal", "window"  # those of budget.forward_flops, without the router


def floor(config, S, rates, recomputed=("qkv", "out", "gate_up", "down")):
    """{name: seconds} of a step over S tokens at rates[name]["forward" or "backward"] TFLOP/s: the
    composed floor, or with one of budget.RECOMPUTED that of a step which recomputes these."""
    times, flops = {}, forward_flops(config, S)
    for name in OPERATIONS:
        forwards = 2 if name in recomputed else 1
        there = forwards / rates[name]["forward"]
        back = backward_forwards(name) / rates[name]["backward"]
        times[name] = flops[name] * (there + back) / 1e12
    return times


def best_rates(ceilings, S):
    """{name: {"forward", "backward"}} in TFLOP/s at S tokens: the fastest kernel measured for
    each."""
    rates = defaultdict(lambda: {"forward": 0, "backward": 0})
    for ceiling in ceilings:
        if "error" not in ceiling and ceiling["tokens"] in (None, min(S, LONG)):
            for way in "forward", "backward":
                rates[ceiling["name"]][way] = max(rates[ceiling["name"]][way], ceiling[way])
    return dict(rates)


def measure(name, flops, forward, backward, prepare=tuple):
    """Times and rates of a pair of kernels. `prepare`, not timed, makes the arguments of the
    backward."""
    there, back = seconds(forward), seconds(backward, prepare)
    return {
        "forward": flops / there / 1e12,
        "backward": flops * backward_forwards(name) / back / 1e12,
        "forward_ms": there * 1e3,
        "backward_ms": back * 1e3,
    }


def measure_matmul(config, name):
    """x @ W.T, or for the experts a grouped matmul with equal shares; "matmul" is a large square
    one."""
    size, tokens = (8192, 32 * K) if GPU else (128, 64)
    uses, inputs, outputs = matrices(config).get(name, (1, size, size))
    # the logits of 32K tokens would take 12 GiB
    R = uses * {"matmul": size, "unembedding": tokens // 8}.get(name, tokens)
    x, g, flops = random(R, inputs), random(R, outputs), 2 * R * inputs * outputs
    if name not in EXPERTS:
        w = random(outputs, inputs)
        return measure(name, flops, lambda: x @ w.t(), lambda: (g @ w, g.t() @ x))
    w = random(config.num_experts, inputs, outputs)
    ends = torch.arange(1, config.num_experts + 1, device=DEVICE, dtype=torch.int32)
    mm = functools.partial(F.grouped_mm, offs=ends * (R // config.num_experts))
    return measure(name, flops, lambda: mm(x, w), lambda: (mm(g, w.mT), mm(x.t(), g)))


def attention_kernels(config, S):
    """[(name, which kernel, window, attention(q, k, v, sinks))] of those that can run here."""
    windows = {"causal": None, "window": config.sliding_window}
    if not GPU:
        return [
            (name, "dense", w, functools.partial(gptoss.dense_attention, window=w))
            for name, w in windows.items()
        ]
    masks = {w: flash.block_mask(S, w, None, DEVICE) for w in windows.values()}
    kernels = [
        (name, "Flex", w, functools.partial(gptoss.flex_sink_attention, mask=masks[w]))
        for name, w in windows.items()
    ]
    if flash.cudnn_refuses(DEVICE, DTYPE, config.head_dim):
        return kernels
    return [("causal", "cuDNN", None, flash.CudnnSinkAttention.apply), *kernels]


def measure_attention(config, name, S, window, attend):
    heads, kv_heads, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    inputs = [random(1, S, h, D) for h in (heads, kv_heads, kv_heads)] + [random(heads)]
    inputs, g = [x.requires_grad_() for x in inputs], random(1, S, heads, D)
    torch._dynamo.reset()  # each length compiled for itself, as in the model

    def forward():
        return attend(*inputs)

    def backward(out):
        torch.autograd.grad(out, inputs, g)

    flops = attention_flops(config, S, window)
    return measure(name, flops, forward, backward, prepare=lambda: (forward(),))


CEILING = [
    ("\nCeilings", "label", "<40"),
    ("forward: ms", "forward_ms", ">12.2f"),
    ("TFLOP/s", "forward", ">10.4g"),
    ("backward: ms", "backward_ms", ">14.2f"),
    ("TFLOP/s", "backward", ">10.4g"),
]


def section(options, config, results):
    def ceiling(label, name, tokens, function, *arguments):
        row = {"label": label, "name": name, "tokens": tokens}
        row |= attempt(function, config, name, *arguments)
        results.add("ceilings", row)
        say_row(CEILING, row)

    say_row(CEILING)
    ceiling("matmul, square", "matmul", None, measure_matmul)
    for name in MATRICES:
        _, inputs, outputs = matrices(config)[name]
        ceiling(f"{name}, {inputs} -> {outputs}", name, None, measure_matmul)
    for S in sorted({min(S, LONG) for S in options.rows}):
        for name, kernel, window, attend in attention_kernels(config, S):
            kind = f"window {window}" if window else "causal"
            label = f"attention {length(S)}, {kind}, {kernel}"
            ceiling(label, name, S, measure_attention, S, window, attend)
