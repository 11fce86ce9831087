"""What many GPUs will do, measured on one: `python train.py CONFIG --rehearse=true`.

train.py runs its own loop as one rank of many. Weights, gradients and optimizer have the size of a
rank's shards; kernels, memory and offload are real. `StandIn` takes the place of the process group:
a collective is a local copy of all bytes that this rank would receive. Under torchrun the ranks are
real, and the same steps are measured with communication."""

import functools
import gc
import json
import os
import signal
import statistics
import tempfile
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

import sp
from data import TokenData
from loop.budget import GIB
from loop.checks import check_folder
from loop.guards import memory_advice
from loop.options import check_ranks, model_config
from loop.plan import peak, settings_of
from model import GPTOSSConfig
from text.tokenizer import TOKENIZERS

KINDS = "all_gather", "reduce_scatter", "all_to_all", "all_reduce"
STEPS = 4  # of which the first compiles; the time of a step is the median of the others
LONG = 256 * 1024  # tokens in a sequence beyond which one step is timed

# --------------------------------------------------------------------------------------------------
# The stand-in for the process group


class Done(dist.distributed_c10d.Work):
    """What a collective returns. Its copies are queued on a stream of their own, as NCCL's work is:
    waiting makes the current stream wait."""

    copied = None  # an event, on a GPU

    def wait(self, timeout=None):
        if self.copied:
            torch.cuda.current_stream().wait_event(self.copied)
        return True

    def is_completed(self):
        return True


class StandIn(dist.ProcessGroup):
    """A process group of which this process is the only rank that exists.

    The others are taken to have this rank's numbers, but all-gathered shards are shifted, so that
    for instance the rows of a router's weight differ. `calls`: (kind, bytes sent, copy events) of
    every collective of every group, in order."""

    calls = []

    def __init__(self, rank, size):
        super().__init__(rank, size)
        self.ranks = size

    @property
    def group_name(self):
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self):
        return "stand-in"

    @contextmanager
    def call(self, kind, sent):
        """Record a collective whose copies are made inside the context. Yields what it returns."""
        done, stream, events = Done(), None, None
        if torch.cuda.is_available():
            stream = stand_in_stream()
            stream.wait_stream(torch.cuda.current_stream())
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.stream(stream):
            if events:
                events[0].record()
            yield done
            if events:
                events[1].record()
                done.copied = events[1]
        StandIn.calls.append((kind, sent, events))

    def all_gather_single(self, output, shard, opts=None):
        """output (n s), shard (s): rank r's shard is this one, shifted by 3 r numbers."""
        with self.call("all_gather", (self.ranks - 1) * shard.nbytes) as done:
            shard = shard.flatten()
            for r, part in enumerate(output.view(self.ranks, -1)):
                shift = 3 * r % max(len(shard), 1)
                part[shift:].copy_(shard[: len(shard) - shift])
                part[:shift].copy_(shard[len(shard) - shift :])
        return done

    def reduce_scatter_single(self, output, whole, opts=None):
        """output (s), whole (n s): its n parts are summed, as if each came from another rank."""
        with self.call("reduce_scatter", whole.nbytes - output.nbytes) as done:
            torch.sum(whole.view(self.ranks, -1), 0, out=output.view(-1))
        return done

    def all_to_all_single(self, output, given, output_sizes, input_sizes, opts=None):
        """Integers number the documents of this rank's slice of a sequence: those of the others'
        slices get numbers of their own. Outside of sp's group an all-to-all is half of a
        reduce-scatter, see memory.ReduceScatter, and counted as one."""
        kind = "all_to_all" if self is sp.group() else "reduce_scatter"
        with self.call(kind, given.nbytes - given.nbytes // self.ranks) as done:
            output.copy_(given.view_as(output))
            if not output.is_floating_point() and output.numel():
                blocks = output.view(self.ranks, -1)
                blocks += torch.arange(self.ranks, device=output.device)[:, None] * (
                    given.max() + 1
                )
        return done

    def allreduce(self, tensors, opts):
        sent = sum(t.nbytes for t in tensors)
        with self.call("all_reduce", 2 * (sent - sent // self.ranks)) as done:
            if opts.reduceOp == dist.ReduceOp.SUM:
                for t in tensors:
                    t.mul_(self.ranks)
        return done

    def broadcast(self, tensors, opts):
        return Done()

    def barrier(self, opts=None):
        return Done()

    # their names before PyTorch 2.13
    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single


@functools.cache
def stand_in_stream():
    """One per process, and not memory.copy_stream: copies to the host wait for no collective."""
    return torch.cuda.Stream()


@contextmanager
def stand_in(ranks):
    """A context in which this process is rank 0 of `ranks`, whatever backend the program asks
    for."""
    backend = "stand-in"
    if backend not in dist.Backend.backend_list:
        dist.Backend.register_backend(
            backend, lambda store, rank, size, timeout: StandIn(rank, size), devices=["cpu", "cuda"]
        )
    StandIn.calls = []
    init, new_group = dist.init_process_group, dist.new_group

    def stand_in_init(*_, **__):
        init(backend, rank=0, world_size=ranks, store=dist.HashStore())

    def stand_in_group(*args, **settings):
        return new_group(*args, **(settings | {"backend": backend}))

    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    with (
        patch.object(dist, "init_process_group", stand_in_init),
        patch.object(dist, "new_group", stand_in_group),
        patch.dict(os.environ, environment),
    ):
        try:
            yield
        finally:
            sp.init(None)
            if dist.is_initialized():
                dist.destroy_process_group()


# --------------------------------------------------------------------------------------------------
# The rehearsal


def random_corpus(folder, tokens, vocab_size):
    """Write a corpus of documents of random tokens, one for each number of targets in `tokens`."""
    name = "o200k_harmony" if vocab_size >= TOKENIZERS["o200k_harmony"].vocab_size else "bytes"
    highest = min(vocab_size, TOKENIZERS[name].vocab_size)
    ends = np.cumsum([0, *(n + 1 for n in tokens)])
    random = np.random.default_rng(0)
    folder.mkdir()
    random.integers(highest, size=ends[-1], dtype=np.uint32).tofile(folder / "tokens.bin")
    ends.astype("<u8").tofile(folder / "documents.bin")
    np.ones(ends[-1], "u1").tofile(folder / "counted.bin")
    meta = {"tokenizer": name, "tokens": int(ends[-1]), "documents": len(tokens)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def data_of(options, config, folder):
    """The name of a corpus to rehearse with, and words about it: options.data, if it can serve. No
    corpus has the name "random"; bench asks for it."""
    try:
        data = TokenData(options.data, options.seq_len, vocab_size=config.vocab_size)
        if data.sequences_per_epoch >= options.batch_size:
            return options.data, options.data
        reason = f"it fills fewer than {options.batch_size} sequences"
    except (ValueError, OSError) as error:
        reason = str(error)
    random = random_corpus(
        folder / "data", [options.seq_len] * options.batch_size, config.vocab_size
    )
    if options.data == "random":
        return str(random), "random"
    return str(random), f"random, because data={options.data} cannot serve: {reason}"


def has_config(checkpoint):
    return (Path(checkpoint) / "config.json").exists()


def sizes_of(options):
    """The model's sizes: the checkpoint's if it is there, else the options'."""
    if options.checkpoint and not has_config(options.checkpoint):
        return model_config(replace(options, checkpoint=""))
    return model_config(options)


@contextmanager
def signals_restored():
    """train.py handles signals until its process ends; this one may go on."""
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    wakeup = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def rehearse(options, train):
    """Run `train` for a few steps as one of options.ranks ranks, or under torchrun as all of them.
    Prints what was measured and writes it to runs/NAME/rehearsal.json."""
    real = "WORLD_SIZE" in os.environ
    ranks, first = (
        int(os.environ.get("WORLD_SIZE", options.ranks)),
        os.environ.get("RANK", "0") == "0",
    )
    config = sizes_of(options)
    check_ranks(options, config, ranks)
    check_folder(options)
    if torch.cuda.is_available():  # what ran before in this process is not part of it
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_accumulated_memory_stats()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        data, said = data_of(options, config, Path(folder))
        if first:
            print(f"tokens: {said}")
            where = f"{ranks} real ranks" if real else f"one of {ranks} ranks, the others not there"
            print(f"rehearsal as {where}; weights: random", flush=True)
            if options.checkpoint and not has_config(options.checkpoint):
                sizes = f"{config.num_hidden_layers} layers, {config.num_experts} experts"
                print(f"checkpoint={options.checkpoint} is not there: the sizes given, {sizes}")
        run = replace(
            options,
            **{f.name: getattr(config, f.name) for f in fields(GPTOSSConfig)},
            checkpoint="",
            data=data,
            steps=2 if options.seq_len > LONG else STEPS,
            warmup_steps=STEPS,
            resume=False,
            epochs=0.0,
            eval_every=0,
            save_every=0,
            stop_after=0,
            keep_best=False,
            sample="",
            wandb=False,
            log_every=1,
        )
        run.name = str(Path(folder) / "run")  # absolute: it is not in runs/
        try:
            with nullcontext() if real else stand_in(ranks), signals_restored():
                train(run)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"rehearsal as one of {ranks} ranks: {memory_advice(options)}"
            ) from None
        if first:
            steps = Path(run.name, "metrics.jsonl").read_text().splitlines()
            if len(steps) < run.steps:  # it was asked to stop
                raise KeyboardInterrupt
            found = measured(run, config, ranks, [json.loads(line) for line in steps], real)
    if not first:
        return
    found["gbps"], found["settings"] = options.gbps, asdict(options)
    path = Path("runs") / options.name / "rehearsal.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(".rehearsal.partial")
    aside.write_text(json.dumps(found, indent=2) + "\n")
    aside.replace(path)
    print("\n".join(table(found, ranks, real)))
    print(f"written to {path}", flush=True)
    return found


def measured(options, config, ranks, steps, real):
    """The numbers of a rehearsal, from the metrics of its steps; None what cannot be measured."""
    timed, gpu = steps[1:], torch.cuda.is_available()
    settings = settings_of(options, config, ranks)
    seconds = statistics.median(step["ms"] for step in timed) / 1000
    calls = StandIn.calls
    sent = {kind: sum(size for k, size, _ in calls if k == kind) // len(steps) for kind in KINDS}
    copying = None
    if gpu and not real:
        torch.cuda.synchronize()
        copying = sum(start.elapsed_time(end) for _, _, (start, end) in calls) / 1000 / len(steps)
    found = {
        "ranks": ranks,
        "real_ranks": real,
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
        "steps": len(steps),
        "peak_gib": timed[-1].get("peak_gib"),
        "reserved_gib": torch.cuda.max_memory_reserved() / GIB if gpu else None,
        "alloc_retries": timed[-1].get("alloc_retries"),
        "dry_run_gib": peak(config, settings) / GIB,
        "seconds": seconds,
        "compile_seconds": max(steps[0]["ms"] / 1000 - seconds, 0),
        "copy_seconds": copying,
        "tokens_per_s_per_rank": options.batch_size * options.seq_len / ranks / seconds,
        "mfu": statistics.median(s["mfu"] for s in timed) if "mfu" in timed[0] else None,
        "sent_bytes": None if real else sent,
        "sending_seconds": None,
        "hideable_share": None,
    }
    if not real:
        total, fsdp = sum(sent.values()), sum(sent.values()) - sent["all_to_all"]
        found["sending_seconds"] = total / options.gbps / 1e9
        found["hideable_share"] = fsdp / total if total else None
    return found


def table(found, ranks, real):
    """Yield the lines of the table on the screen."""

    def line(key, form, unit, *words):
        value = "?" if found[key] is None else format(found[key], form)
        return f"{value:>10} {unit:4} {''.join(words)}"

    def word(key, form=""):
        return "?" if found[key] is None else format(found[key], form)

    yield f"\n{found['device']}, torch {found['torch']}, {found['steps']} steps; the first compiles"
    stops = f"{word('alloc_retries')} stops of a full allocator"
    yield line("peak_gib", ".1f", "GiB", f"peak; {word('reserved_gib', '.1f')} reserved, {stops}")
    yield line("dry_run_gib", ".1f", "GiB", "by the arithmetic of the dry run")
    how = "with" if real else "without"
    yield line("seconds", ".3f", "s", f"a step, {how} communication")
    yield line("tokens_per_s_per_rank", ",.0f", "", f"tok/s per rank, mfu {word('mfu', '.1%')}")
    if real:
        return
    yield line("copy_seconds", ".3f", "s", "of a step are the stand-in's own copies")
    for kind, size in found["sent_bytes"].items():
        yield f"{size / 1e9:10.3f} GB   sent per step, {kind}"
    share = f"{word('hideable_share', '.0%')} of it FSDP's, which can hide behind computation"
    rate = f"at {found['gbps']:.0f} GB/s"
    yield line("sending_seconds", ".3f", "s", f"to send that {rate}; {share}")
    yield "Not in it: the time to send, waiting for other ranks, the memory of NCCL. Weights are"
    yield "random, and the other ranks' weights are shifted copies of this rank's."
