"""Full training steps on several GPUs, as train.py makes them: FSDP2, Ulysses, clipping, the
optimizer."""

import functools
import math
import os
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile

import sp
from bench.common import DEVICE, DTYPE, GIB, GPU, LONG, K, out_of_memory, release, synchronize
from bench.kernels import measure_matmul
from bench.report import length, say, say_row
from bench.settings import card, fitting, ranks_per_sequence
from bench.speed import SPEED, measure_steps
from loop import plan
from loop.memory import HostMemory
from loop.options import Options
from train import (
    all_sum,
    build_model,
    build_optimizer,
    gradient_norm_squared,
    group_of,
    scale_gradients_,
    start_ranks,
)


def exposed(communication, computation):
    """The time in which something of `communication` and nothing of `computation` runs; both are
    lists of (start, end)."""
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
    """The share of run(), which returns its seconds, in which the GPU does nothing but
    communicate."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        elapsed = run()
    kernels = defaultdict(list)
    for e in profiler.events():
        if e.device_type == DeviceType.CUDA and not e.is_user_annotation:  # those only span kernels
            kernels[e.name.startswith("nccl")].append((e.time_range.start, e.time_range.end))
    return exposed(kernels[True], kernels[False]) / 1e6 / elapsed


def training_step(model, optimizer, tokens, targets, documents, count, offload):
    """(seconds of a step, seconds of its optimizer), with gradients clipped to 1."""
    synchronize()
    dist.barrier()
    began = time.perf_counter()
    with HostMemory() if offload else nullcontext():
        loss = model(tokens, targets, documents, count=count)
    loss.backward()
    loss, square = all_sum(loss.detach(), gradient_norm_squared(model), device=DEVICE)
    if not math.isfinite(loss + square):
        raise ValueError(f"the loss is {loss}, the squared norm of the gradient {square}")
    if square > 1:
        scale_gradients_(model, square**-0.5)
    synchronize()
    middle = time.perf_counter()
    optimizer.step()
    optimizer.zero_grad()
    synchronize()
    return time.perf_counter() - began, time.perf_counter() - middle


@functools.cache
def sharing(n):
    """The mesh of the n ranks that share each sequence, this one among them. Rows with the same n
    use one group, because NCCL holds memory for each."""
    rows = torch.arange(dist.get_world_size()).view(-1, n)
    return DeviceMesh.from_group(group_of(rows), DEVICE.type)


def measure_training(config, model, optimizer, row, documents=None):
    """What to add to a row, whose sequences may be packed: documents (S). Its peak memory is that
    of the rank with the most."""
    ranks, S, in_optimizer = dist.get_world_size(), row["sequence"], []
    release()
    sp.init(sharing(row["sp"]) if row["sp"] > 1 else None)
    generator = torch.Generator().manual_seed(dist.get_rank() // row["sp"])
    whole = torch.randint(config.vocab_size, (2, row["micro_batch"], S), generator=generator)
    if documents is not None:
        documents = documents.expand(row["micro_batch"], -1)
    tokens, targets, documents = (
        x if x is None else x.to(DEVICE).contiguous() for x in sp.shard(*whole, documents)
    )
    count = torch.tensor(row["tokens"], device=DEVICE)

    def run():
        batch = tokens, targets, documents, count
        elapsed, part = training_step(model, optimizer, *batch, row["offload"])
        in_optimizer.append(part)
        return elapsed

    found = measure_steps(config, S, row["tokens"] / ranks, run)
    found["optimizer_seconds"] = in_optimizer[-1]
    if GPU:
        peak = torch.tensor(found["peak_gib"], device=DEVICE)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found["peak_gib"] = peak.item()
        found["communication"] = communication_share(run) if S <= LONG else None
    return found


COLUMNS = [
    ("sequences", "row", "<11"),
    ("sp", "sp", ">3"),
    ("recompute", "recompute", ">10"),
    ("kept blocks", "keep_blocks", ">12"),
    ("offload", "offload", ">8"),
    *SPEED,
    ("peak GiB", "peak_gib", ">10.1f"),
    ("estimate", "estimate_gib", ">9.1f"),
    ("step s", "seconds", ">9.3f"),
    ("optimizer s", "optimizer_seconds", ">12.3f"),
    ("communication", "communication", ">14.1%"),
    ("retries", "retries", ">8"),
    ("compile s", "compile_seconds", ">10.1f"),
]


def row_of(options, config, parameters, ranks, sequences, S):
    """The settings of a row of the table, and the memory they need by the dry run's arithmetic."""
    sp = ranks_per_sequence(options, ranks, sequences)
    micro_batch = max(1, sequences * sp // ranks)
    sequences = micro_batch * ranks // sp
    settings = {
        "parameters": parameters,
        "ranks": ranks,
        "sp": sp,
        "replicas": 1,
        "seq_len": S,
        "micro_batch": micro_batch,
        "micro_batches": 1,
        "gpu_gib": card(options),
    }
    found = fitting(options, config, settings, (options.optimizer,))
    return {
        "row": f"{sequences} x {length(S)}",
        "sequence": S,
        "tokens": sequences * S,
        "sp": sp,
        "micro_batch": micro_batch,
        **found,
        "estimate_gib": plan.peak(config, settings | found) / GIB,
    }


def start(options, config, results):
    """(config, model, optimizer, rate of a matmul in TFLOP/s) on all ranks of torchrun."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ranks, config = int(os.environ["WORLD_SIZE"]), replace(config, max_position_embeddings=K * K)
    options.optimizer = options.optimizer or "split"
    settings = Options(**asdict(config), optimizer=options.optimizer, batch_size=ranks)
    device, mesh = start_ranks(settings)
    ceiling = all_sum(measure_matmul(config, "matmul")["forward"], device=device)[0] / ranks
    model = build_model(settings, config, device, mesh, DTYPE)
    optimizer = build_optimizer(settings, model)
    results.save(ranks=ranks, optimizer=options.optimizer, matmul=ceiling)
    return config, model, optimizer, ceiling


def run_row(options, config, model, optimizer, results, sequences, S, documents=None):
    """A row of the table. If a rank is out of memory it ends, and with it the table."""
    parameters, ranks = sum(p.numel() for p in model.parameters()), dist.get_world_size()
    row = row_of(options, config, parameters, ranks, sequences, S)
    model.recompute, model.keep_blocks = row["recompute"], row["keep_blocks"]
    try:
        return row | measure_training(config, model, optimizer, row, documents)
    except Exception as error:
        if not out_of_memory(error):
            raise
        leave(results, row)


def section(options, config, results):
    config, model, optimizer, ceiling = start(options, config, results)
    ranks = dist.get_world_size()
    say(f"\nFull training steps on {ranks} ranks, optimizer {options.optimizer}; speeds of one GPU")
    say(f"of matmul: of {ceiling:.4g} TFLOP/s")
    say("communication: a profiled step's share in which only NCCL's kernels run")
    say_row(COLUMNS)
    for sequences, S in options.rows:
        row = run_row(options, config, model, optimizer, results, sequences, S)
        row["share_of_matmul"] = row["tflops"] / ceiling
        results.add("rows", row)
        say_row(COLUMNS, row)
    dist.destroy_process_group()


def leave(results, row):
    """End this rank, which is out of memory. At once: the others wait for it inside NCCL, until its
    end makes torchrun end them."""
    results.writes = True
    results.add("rows", row | {"error": "out of memory"})
    rank = dist.get_rank()
    print(
        f"{row['row']}: out of memory on rank {rank}; the table ends, no rank can go on alone",
        flush=True,
    )
    os._exit(1)
