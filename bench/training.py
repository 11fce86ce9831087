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
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

import sp
from bench.common import DEVICE, DTYPE, GIB, GPU, LONG, K, out_of_memory, release, synchronize
from bench.kernels import measure_matmul
from bench.report import length, say, say_row
from bench.speed import SPEED, measure_steps
from loop.budget import estimate
from loop.memory import HostMemory
from loop.options import Options
from train import all_sum, build_model, build_optimizer, gradient_norm_squared, start_ranks


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


def training_step(model, optimizer, tokens, targets, count, offload):
    """(seconds of a step, seconds of its optimizer), with gradients clipped to 1."""
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
    shape = ranks // row["sp"], row["sp"]
    sp.init(init_device_mesh(DEVICE.type, shape, mesh_dim_names=("batch", "sp"))["sp"])
    generator = torch.Generator().manual_seed(dist.get_rank() // row["sp"])
    whole = torch.randint(config.vocab_size, (2, row["micro_batch"], S), generator=generator)
    tokens, targets = (x.to(DEVICE) for x in sp.shard(*whole))
    count = torch.tensor(row["tokens"], device=DEVICE)

    def run():
        elapsed, part = training_step(model, optimizer, tokens, targets, count, row["offload"])
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


def ranks_per_sequence(options, ranks, sequences):
    """--sp, or as many ranks as there are for each sequence."""
    return max(1, ranks // sequences) if options.sp is None else options.sp


def least_recomputation(options, layers, needs):
    """The settings that recompute least and, by needs(**settings) in bytes, leave a twelfth of the
    GPU free. What was given on the command line stays, whether it fits or not."""
    room = 11 / 12 * torch.cuda.get_device_properties(DEVICE).total_memory if GPU else math.inf
    modes = ["attention", "all"] if options.recompute == "auto" else [options.recompute]
    blocks = range(layers, -1, -1) if options.keep_blocks is None else [options.keep_blocks]
    choices = [{"recompute": modes[0], "keep_blocks": n, "offload": False} for n in blocks]
    if not options.keep_blocks and options.recompute != "none":
        choices += [{"recompute": mode, "keep_blocks": 0, "offload": GPU} for mode in modes]
    return next((choice for choice in choices if needs(**choice) <= room), choices[-1])


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


def section(options, config, results):
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ranks, config = int(os.environ["WORLD_SIZE"]), replace(config, max_position_embeddings=K * K)
    options.optimizer = options.optimizer or "split"
    settings = Options(**asdict(config), optimizer=options.optimizer, batch_size=ranks)
    device, mesh = start_ranks(settings)
    ceiling = all_sum(measure_matmul(config, "matmul")["forward"], device=device)[0] / ranks
    model = build_model(settings, config, device, mesh, DTYPE)
    optimizer = build_optimizer(settings, model)
    results.save(ranks=ranks, optimizer=options.optimizer, matmul=ceiling)
    peak = functools.partial(
        estimate,
        config,
        parameters=sum(p.numel() for p in model.parameters()),
        ranks=ranks,
        replicas=1,
        optimizer=options.optimizer,
    )
    say(f"\nFull training steps on {ranks} ranks, optimizer {options.optimizer}; speeds of one GPU")
    say(f"of matmul: of {ceiling:.4g} TFLOP/s")
    say("communication: a profiled step's share in which only NCCL's kernels run")
    say_row(COLUMNS)
    for sequences, S in options.rows:
        n = ranks_per_sequence(options, ranks, sequences)
        micro_batch = max(1, sequences * n // ranks)

        def needs(seq_len=S, sp=n, micro_batch=micro_batch, **settings):
            found = peak(seq_len=seq_len, sp=sp, micro_batch=micro_batch, **settings)
            return sum(found.values())

        settings = least_recomputation(options, config.num_hidden_layers, needs)
        model.recompute, model.keep_blocks = settings["recompute"], settings["keep_blocks"]
        sequences = micro_batch * ranks // n
        row = {
            "row": f"{sequences} x {length(S)}",
            "sequence": S,
            "tokens": sequences * S,
            "sp": n,
            "micro_batch": micro_batch,
            **settings,
            "estimate_gib": needs(**settings) / GIB,
        }
        try:
            row |= measure_training(config, model, optimizer, row)
            row["share_of_matmul"] = row["tflops"] / ceiling
        except Exception as error:
            if not out_of_memory(error):
                raise
            leave(results, row)
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
