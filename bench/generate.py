"""Generation: how long a prompt waits for its first token, and the tokens per second that follow.

    python -m bench --generate                               # rows 1x128, 1x4K, 1x32K, 64x512
    python -m bench --generate --against=transformers --rows=1x4K,16x1K

A row 64x512 is 64 prompts of 512 tokens, decoded together. Weights are random, so nothing ever
stops. "first call" compiles, captures and is not timed again. "launched" decodes without CUDA
graphs. "floor" is the time to read a step's weights once at the bandwidth of a copy.
"""

import functools
import importlib.metadata
import time
from dataclasses import replace
from unittest.mock import patch

import torch

import fast
from bench.common import DEVICE, GIB, GPU, attempt, release, seconds, synchronize
from bench.report import length, say, say_row
from bench.speed import build_ours, build_theirs
from generate import Decoder, capturable, generate

TOKENS = 128 if GPU else 8  # of an answer
COLUMNS = [
    ("model", "model", "<28"),
    ("prompts", "row", ">9"),
    ("first call s", "first_call", ">13.1f"),
    ("first token s", "first_token", ">14.3f"),
    ("ms/step", "ms", ">9.2f"),
    ("tok/s", "rate", ">9.1f"),
    ("launched ms", "launched_ms", ">12.2f"),
    ("floor ms", "floor_ms", ">9.2f"),
    ("peak GiB", "peak_gib", ">9.1f"),
]


def prompts_of(config, B, S):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (B, S), generator=generator)


def bandwidth():
    """Bytes per second that a GPU reads and writes in a copy."""
    source = torch.empty((2 * GIB if GPU else 2**20) // 4, device=DEVICE)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: copy.copy_(source))


def bytes_read(config, B):
    """The weights that a step with B tokens reads, experts in the number expected of a router that
    chooses at random."""
    c, item = config, 2
    heads = (2 * c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    expert = 3 * c.hidden_size * c.intermediate_size
    used = c.num_experts * (1 - (1 - c.experts_per_token / c.num_experts) ** B)
    layer = heads * c.hidden_size + used * expert
    return item * (c.num_hidden_layers * layer + c.vocab_size * c.hidden_size)


def timed(decoder, prompts, tokens):
    """(seconds to the first token of every prompt, seconds per step after it)"""
    synchronize()
    start, times = time.perf_counter(), []
    for _ in decoder.stream(prompts, tokens):
        times.append(time.perf_counter())
    first = times[len(prompts) - 1]
    return first - start, (times[-1] - first) / max(tokens - 1, 1)


def our_row(model, B, S, rate):
    prompts = prompts_of(model.config, B, S).tolist()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    decoder = Decoder(model, B, S + TOKENS)
    timed(decoder, prompts, TOKENS)
    first_call = time.perf_counter() - start
    first, step = timed(decoder, prompts, TOKENS)
    row = {"first_call": first_call, "first_token": first, "ms": 1e3 * step, "rate": B / step}
    if decoder.captures:
        decoder.captures = False
        decoder.graphs.clear()  # or what was captured would run
        row["launched_ms"] = 1e3 * timed(decoder, prompts, min(TOKENS, 17))[1]
    row["floor_ms"] = 1e3 * bytes_read(model.config, B) / rate
    if GPU:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return row


@torch.no_grad()
def their_row(model, B, S):
    tokens = prompts_of(model.config, B, S).to(DEVICE)
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}

    def run(n):
        synchronize()
        start = time.perf_counter()
        model.generate(tokens, max_new_tokens=n, min_new_tokens=n, **options)
        synchronize()
        return time.perf_counter() - start

    if GPU:
        torch.cuda.reset_peak_memory_stats()
    eager = model.config._attn_implementation == "eager"
    few = min(TOKENS, 33 if eager else 5)  # flex may compile for every length
    first_call, first = run(3), run(1)
    step = (run(few) - first) / (few - 1)
    row = {"first_call": first_call, "first_token": first, "ms": 1e3 * step, "rate": B / step}
    if GPU:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return row


# --------------------------------------------------------------------------------------------------
# Is it right, and where does a step's time go


@torch.no_grad()
def compare(model, name):
    """Say whether captured and launched steps draw the same, and whether a model without a cache
    would draw it. In fp32 all must agree. In bf16 rounding sends tokens to other experts, so that
    with random weights near ties fall either way."""
    S, n = (300, 64) if GPU else (20, 8)
    prompts = prompts_of(model.config, 3, S)
    prompts = [prompts[0, : S // 3].tolist(), prompts[1].tolist(), prompts[2, :1].tolist()]
    for few in (3, 0) if fast.is_on("experts") else (0,):
        with patch.object(fast, "FEW_TOKENS", few):
            answers = generate(model, prompts, n, temperature=0)
            captured = capturable(model, len(prompts))
            again = generate(model, prompts, n, temperature=0, graphs=False)
        way = f"{name}, {'own' if few else 'grouped'} experts, {'' if captured else 'not '}captured"
        equal = sum(
            one == other for a, b in zip(answers, again) for one, other in zip(a.tokens, b.tokens)
        )
        say(f"{way}: {equal} of {3 * n} tokens equal those of launched steps; without a cache")
        for prompt, (tokens, logprobs) in zip(prompts, answers):
            both = torch.tensor([prompt + tokens], device=DEVICE)
            inputs, targets = both[:, :-1], both[:, 1:]
            likeliest = model(inputs)[0, len(prompt) - 1 :].argmax(-1)
            equal = (likeliest == targets[0, len(prompt) - 1 :]).sum()
            expected = model.logprobs(inputs, targets)[0, len(prompt) - 1 :].cpu()
            error = (torch.tensor(logprobs) - expected).abs()
            say(
                f"  a prompt of {len(prompt):3d}: {equal} of {n} tokens equal; "
                f"log p differs by {error.mean():.2e}, at most {error.max():.2e}"
            )


def say_kernels(model, B, S):
    """The kernels of one launched step that take longest."""
    decoder = Decoder(model, B, S + 8, graphs=False)
    prompts = enumerate(prompts_of(model.config, B, S).tolist())
    decoder.start([(slot, prompt, 0, 8) for slot, prompt in prompts])
    with torch.no_grad():
        decoder.launch(range(B))()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            decoder.launch(range(B))()
    kernels = sorted(profile.key_averages(), key=lambda e: -e.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels) / 1e3
    number = sum(kernel.count for kernel in kernels)
    say(f"\nOne step of {B} sequences of {length(S)}: {number} kernels, {total:.2f} ms of GPU time")
    for kernel in kernels[:14]:
        spent = kernel.self_device_time_total / 1e3
        say(f"  {spent:7.3f} ms {kernel.count:5d}  {kernel.key[:75]}")


def say_experts(model):
    """The experts of one layer, two ways, for few tokens."""
    mlp = model.blocks[0].mlp
    copies = [block.mlp for block in model.blocks[:8]]  # more than a cache holds

    def run(x):
        for each in copies:
            each(x)

    say("\nExperts of a layer, us: each token's own matrices, and grouped matmuls")
    for N in (1, 2, 4, 8, 64):
        x = torch.randn(1, N, model.config.hidden_size, device=DEVICE, dtype=mlp.down_weight.dtype)
        times = {}
        for name, limit in ("own", N), ("grouped", 0):
            if limit > 8:
                continue  # it would read eight times what there is
            with torch.no_grad(), patch.object(fast, "FEW_TOKENS", limit):
                call = functools.partial(run, x)
                if GPU:  # captured, as in use
                    call()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        call()
                    call = graph.replay
                times[name] = f"{1e6 * seconds(call) / len(copies):9.1f}"
        say(f"  {N:3d} tokens: {times.get('own', '-'):>9} {times['grouped']}")


def section(options, config, results):
    def run(name, row_of, model, rows, *arguments):
        for B, S in rows:
            row = attempt(row_of, model, B, S, *arguments)
            row = {"model": name, "row": f"{B}x{length(S)}", "sequences": B, "tokens": S} | row
            results.add("rows", row)
            say_row(COLUMNS, row)

    model, rate = build_ours(config).eval(), bandwidth()
    results.save(answer=TOKENS, bandwidth=rate)
    say(f"\nGeneration: answers of {TOKENS} tokens; a copy moves {rate / 1e12:.2f} TB/s")
    say_row(COLUMNS)
    run("ours", our_row, model, options.rows, rate)
    if GPU:
        for B, S in options.rows[:1] + options.rows[-1:]:
            attempt(say_kernels, model, B, S)
    if fast.is_on("experts"):
        attempt(say_experts, model)
    say("\nAre the tokens right?")
    compare(model, f"bf16, {config.num_hidden_layers} layers")
    del model
    release()
    few = replace(config, num_hidden_layers=min(4, config.num_hidden_layers))
    compare(build_ours(few, torch.float32).eval(), f"fp32, {few.num_hidden_layers} layers")
    release()
    if options.against:
        theirs = build_theirs(config).eval()
        theirs.gradient_checkpointing_disable()
        results["machine"]["transformers"] = importlib.metadata.version("transformers")
        say("")
        say_row(COLUMNS)
        short = [row for row in options.rows if row[1] <= 4096]
        long = [row for row in options.rows if row[1] > 4096]  # eager would make S x S scores
        for attention, rows in ("eager", short), ("flex_attention", long):
            if rows:
                theirs.set_attn_implementation(attention)
                run(f"transformers, {attention}", their_row, theirs, rows)
