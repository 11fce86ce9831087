"""One rank of many, measured on one GPU: `python -m bench --rehearse=8`, and beside the real
ranks; with --gpu_gib as on a smaller GPU."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from bench import profiling
from bench.common import GPU, K, attempt
from bench.report import length, say, say_row
from bench.settings import card, fitting, ranks_per_sequence
from bench.speed import SPEED
from loop import plan
from loop.budget import BYTES, flops_per_token
from loop.options import Options, model_config
from loop.rehearse import rehearse

NAME = "bench-rehearsal"
COLUMNS = [
    ("sequences", "row", "<11"),
    ("sp", "sp", ">3"),
    ("optimizer", "optimizer", ">10"),
    ("recompute", "recompute", ">10"),
    ("kept blocks", "keep_blocks", ">12"),
    ("offload", "offload", ">8"),
    *SPEED[:2],
    ("mfu", "mfu", ">7.1%"),
    ("step s", "seconds", ">9.3f"),
    ("copies s", "copy_seconds", ">9.3f"),
    ("to send s", "sending_seconds", ">10.3f"),
    ("peak GiB", "peak_gib", ">9.1f"),
    ("reserved", "reserved_gib", ">9.1f"),
    ("dry run", "dry_run_gib", ">8.1f"),
    ("stops", "alloc_retries", ">6"),
]
REAL = [("real: s", "real_seconds", ">9.3f"), ("peak", "real_peak_gib", ">7.1f")]
REAL += [("peak off by", "peak_apart", ">12.2%"), ("communication", "communication", ">14.1%")]


def usual_rows(ranks):
    """[(sequences, length)]: each GPU with 8 x 4K, 2 x 16K or 32K tokens of its own, then with 32K
    of longer sequences as long as there are ranks to share them, up to 1M."""
    base = 32 * K if GPU else 64
    alone = [(8 * ranks, base // 8), (2 * ranks, base // 2), (ranks, base)]
    return alone + [(max(1, ranks // n), n * base) for n in ((2, 4, 8, 16, 32) if GPU else (2,))]


def choose(options, config, ranks, sequences, S):
    """train.py's options for a row: the fastest that fit this GPU, or --gpu_gib of it, by the dry
    run's arithmetic; what the command line says stays."""
    sp = ranks_per_sequence(options, ranks, sequences)
    micro_batch = max(1, sequences * sp // ranks)
    row = Options(
        **asdict(config),
        name=NAME,
        data="random",
        ranks=ranks,
        sp=sp,
        seq_len=S,
        batch_size=micro_batch * ranks // sp,
        micro_batch=micro_batch,
        gpu_gib=options.gpu_gib or 0.0,
        rehearse=True,
    )
    settings = plan.settings_of(row, config, ranks) | {"gpu_gib": card(options)}
    return replace(row, **fitting(options, config, settings, ("fp32", "split")))


def measure(row, trace=None):
    """What to add to a row of the table. `trace`: where to write that of its second step, which
    then runs under the profiler: beyond 256K tokens it is the one that is timed."""
    torch._dynamo.reset()  # each length compiled for itself
    if trace is None:
        return rehearse(row, train.train)
    with profiling.profiled_step(train, 2) as (profiler, seconds):
        found = rehearse(row, train.train)
    return found | profiling.show(profiler, seconds[1], trace, moved(row, found))


def moved(row, found):
    """{part of a step: the bytes that it reads and writes}, where they can be counted."""
    ranks, settings = row.ranks, plan.settings_of(row, model_config(row), row.ranks)
    parameters = settings["parameters"]
    gathered = found["sent_bytes"]["all_gather"] * ranks // max(ranks - 1, 1)
    weight, gradient, state = BYTES[row.optimizer]
    # copied from bf16 into one buffer; for memory.ReduceScatter exchanged; read again, added up
    exchanged = 2 * gradient if row.optimizer == "split" and ranks > 2 else 0
    summed = parameters * (2 + gradient + exchanged + gradient + gradient / ranks)
    updated = 2 * weight + gradient + 2 * state  # read and written; the gradient is only read
    return {
        profiling.GATHER: 2 * gathered,
        profiling.PLACE: 2 * gathered,
        profiling.REDUCE: settings["micro_batches"] * summed,
        profiling.OPTIMIZER: updated * parameters / ranks,
    }


def measure_real(row):
    """The same steps on as many real ranks: what to add to a row of the table."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={row.ranks}"]
    given = [f"--{name}={value}" for name, value in asdict(row).items()]
    command = [*launcher, train.__file__, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()
        why = next((line for line in last if line.startswith(("error:", "out of"))), last[-1])
        return {"error": f"real ranks: {why[:160]}"}
    found = json.loads(Path("runs", NAME, "rehearsal.json").read_text())
    return {"real_seconds": found["seconds"], "real_peak_gib": found["peak_gib"]}


def section(options, config, results):
    ranks = options.rehearse
    config = replace(config, max_position_embeddings=K * K)
    columns = COLUMNS + (REAL if options.against else [])
    rows = []
    for sequences, S in options.rows:
        row = choose(options, config, ranks, sequences, S)
        shared = "sp", "optimizer", "recompute", "keep_blocks", "offload"
        line = {"row": f"{row.batch_size} x {length(S)}", "sequence": S}
        line |= {name: getattr(row, name) for name in shared}
        trace = options.out / f"trace-{row.batch_size}x{length(S)}.json.gz"
        line |= attempt(measure, row, trace if options.profile else None)
        if "error" not in line:
            line["tokens_per_second"] = line["tokens_per_s_per_rank"]
            line["tflops"] = flops_per_token(config, S) * line["tokens_per_second"] / 1e12
            if options.against:
                line |= measure_real(row)
        if "real_seconds" in line:
            line["communication"] = line["real_seconds"] / line["seconds"] - 1
            if GPU:
                line["peak_apart"] = line["real_peak_gib"] / line["peak_gib"] - 1
        results.add("rows", line)
        rows.append(line)
    say(f"\nOne rank of {ranks}, rehearsed: the other ranks and communication are not there")
    if options.gpu_gib:
        say(f"in {options.gpu_gib:g} GiB: settings are chosen to fit, and no row may use more")
    if options.against:
        say("real: the same steps on real ranks; communication: how much longer they take")
    say_row(columns)
    for line in rows:
        say_row(columns, line)
