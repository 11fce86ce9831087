"""How fast, how large, how exact: the measurements behind the README's tables and plots.

    python -m bench                          # forward + backward, 4K … 128K tokens; ceilings
    python -m bench --against=transformers   # and transformers on the same rows
    torchrun --nproc_per_node 2 -m bench     # full training steps, 16 x 4K … 1M tokens
    python -m bench --rehearse=8             # one rank of eight, 4K … 1M tokens, on one GPU
    python -m bench --rehearse=8 --gpu_gib=79.2  # the same as on an H100, on a larger GPU
    python -m bench --rehearse=8 --profile --rows=64x4K  # where a training step's time goes
    python -m bench --documents=512,mix      # packed documents beside plain sequences
    python -m bench --fast=false --rows=4K   # the definitions of model.py, fast twins off
    python -m bench --ablation               # what each optimisation is worth
    python -m bench --adapters               # training adapters on packed MXFP4 experts, one GPU
    python -m bench --profile --rows=32K     # where a step's time goes; a trace for ui.perfetto.dev
    python -m bench --accuracy               # bf16 error, ours and transformers', against fp32
    python -m bench --deterministic=true     # are two runs equal to the bit, and what it costs
    python -m bench --generate --against=transformers  # tokens per second of generation
    python -m bench --inspect FOLDER TEXT    # a model's routes, sinks and entropies on a text
    python -m bench --curves                 # losses on one rank, at sp 2 and dp 2; runs/curves.png
    python -m bench --plot                   # docs/bench.png from what an earlier run wrote

Run it in the repository's folder. Nothing is downloaded: weights and tokens are random.
`--layers=4` fits a small card; without a GPU a tiny model stands in. Every row prints as soon as it
is known. FLOPs are model FLOPs (loop/budget.py); bench/kernels.py explains ceilings and floors.
"""

import os

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as in train.py

import argparse
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

import fast
from bench import (
    ablation,
    accuracy,
    adapters,
    curves,
    determinism,
    generate,
    inspection,
    kernels,
    plots,
    profiling,
    speed,
)
from bench.common import GPU, TINY, K
from bench.report import Results, length, machine, parse_documents, parse_ranks, parse_rows, say
from model import GPTOSSConfig

# name: (sections in this order, default rows on a GPU, on a CPU, default layers on a GPU, on a CPU)
COMMANDS = {
    "bench": ([kernels.section, speed.section], "4K,8K,16K,32K,64K,128K", "64,128", 24, 2),
    "train": ([], "16x4K,32K,64K,128K,256K,512K,1M", "4x32,64", 24, 2),  # see measure()
    "adapters": ([adapters.section], "", "", 24, 2),
    "rehearse": ([], "", "", 24, 2),
    "documents": ([], "32K", "1x64", 24, 2),
    "ablation": ([ablation.section], "8K,32K", "64", 6, 2),
    "profile": ([profiling.section], "8K", "128", 24, 2),
    "accuracy": ([accuracy.section], "4K", "64", 2, 2),
    "generate": ([generate.section], "1x128,1x4K,1x32K,64x512", "1x8,3x20", 24, 2),
    "deterministic": ([determinism.section], "8K", "128", 24, 2),
}


OPTIONS = {  # of a measurement
    "rows": (
        {"type": parse_rows, "metavar": "8K,16x4K"},
        "rows of the table: lengths, under torchrun also numbers of sequences; default: all above",
    ),
    "layers": (
        {"type": int, "metavar": "N"},
        "layers of the model; default the 20b's 24, for --ablation 6, for --accuracy 2",
    ),
    "recompute": (
        {"choices": ["auto", "none", "attention", "all"], "default": "auto"},
        "auto: the least that fits; under torchrun by the dry run's arithmetic",
    ),
    "keep_blocks": (
        {"type": int, "metavar": "N"},
        "torchrun: final blocks that recompute nothing; default as many as should fit",
    ),
    "against": (
        {"choices": ["transformers", "ranks"]},
        "measure it on the same rows, after ours; ranks: real ones, after --rehearse",
    ),
    "fast": (
        {"choices": ["true", "false"], "default": "true"},
        "false: the definitions of model.py, without their fast twins",
    ),
    "sp": (
        {"type": int, "metavar": "N"},
        "torchrun: ranks per sequence; default all if there is only one sequence",
    ),
    "optimizer": (
        {"choices": ["fp32", "split"]},
        "torchrun: as in train.py, default split; --rehearse: default the fastest",
    ),
    "gpu_gib": (
        {"type": float, "metavar": "GIB"},
        "--rehearse: use only this many GiB of the GPU (an H100 has 79.2); default all",
    ),
    "profile": (
        {"action": "store_true"},
        "where the time of one step goes, by part and kernel, and a trace; after --rehearse, of a "
        "training step",
    ),
    "out": (
        {"type": Path, "default": Path("runs/bench"), "metavar": "DIR"},
        "where results go, as JSON; default runs/bench",
    ),
}
KINDS = {  # of measurements, one at a time
    "adapters": (
        {"nargs": "?", "const": "short", "choices": ["short", "whole"]},
        "training steps of adapters on packed experts; whole: the longest ones too, for minutes",
    ),
    "ablation": ({"action": "store_true"}, "a step with one optimisation off, for each"),
    "documents": (
        {"type": parse_documents, "metavar": "512,4096,mix"},
        "sequences packed from documents of about these lengths, beside plain ones",
    ),
    "rehearse": (
        {"type": parse_ranks, "metavar": "RANKS"},
        "full training steps on one GPU, as one rank of this many",
    ),
    "accuracy": (
        {"action": "store_true"},
        "error of bf16 against fp32, ours and transformers'",
    ),
    "generate": (
        {"action": "store_true"},
        "time to the first token, and tokens per second, of 16x4K: 16 prompts of 4K tokens",
    ),
    "inspect": (
        {"nargs": 2, "metavar": ("FOLDER", "TEXT")},
        "what a model, a run or a saved state does with a text: routes, sinks, entropies",
    ),
    "deterministic": (
        {"choices": ["true", "false"], "default": "false"},
        "run a row twice; compare to the bit; state the cost",
    ),
    "plot": (
        {"type": Path, "nargs": "?", "const": Path("docs/bench.png"), "metavar": "PNG"},
        "draw DIR/bench.json as docs/bench.png",
    ),
}


def refuse(parser, message):
    """End with the message, printed by the first rank."""
    if os.environ.get("RANK", "0") == "0":
        parser.error(message)
    raise SystemExit(2)


def check_ranks(options, parser):
    """Refuse rows that do not divide among the ranks."""
    from bench.settings import ranks_per_sequence

    ranks = options.rehearse or int(os.environ["WORLD_SIZE"])
    for sequences, S in options.rows:
        n = ranks_per_sequence(options, ranks, sequences)
        row = f"{sequences}x{length(S)}"
        if n < 1 or ranks % n or S % n or S > K * K:
            message = f"sp must divide the {ranks} ranks and the length, at most 1M"
            refuse(parser, f"{row} at sp={n}: {message}")
        if options.sp is None and sequences % (ranks // n):
            groups = ranks // n
            refuse(parser, f"{row}: the sequences must divide among {groups} groups of ranks")


def measure(options, parser):
    deterministic, torchrun = options.deterministic == "true", "RANK" in os.environ
    kinds = "ablation", "adapters", "accuracy", "generate", "rehearse", "documents", "profile"
    chosen = [kind for kind in kinds if getattr(options, kind)]
    if options.profile and chosen[0] not in ("profile", "rehearse"):
        parser.error(f"--profile is for a plain step, or for --rehearse, not for --{chosen[0]}")
    name = chosen[0] if chosen else "deterministic" if deterministic else "bench"
    if name not in ("bench", "documents") and torchrun:
        parser.error(f"--{name} runs on one GPU, without torchrun")
    against = {"bench": "transformers", "generate": "transformers", "rehearse": "ranks"}.get(name)
    if options.against not in (None, against):
        can = f"--against={against}" if against else "nothing"
        parser.error(f"--against={options.against}: --{name} is compared with {can}")
    if options.gpu_gib is not None:
        given = f"--gpu_gib={options.gpu_gib:g}"
        if name != "rehearse":
            refuse(parser, f"{given} limits a rehearsal: give --rehearse=8 too, or leave it out")
        if not 0 < options.gpu_gib < math.inf:
            refuse(parser, f"{given} must be positive, and finite")
    name = "train" if torchrun and name == "bench" else name
    sections, on_gpu, on_cpu, *layers = COMMANDS[name]
    usual = on_gpu if GPU else on_cpu
    options.rows = options.rows or (parse_rows(usual) if usual else [])
    if name in ("train", "rehearse", "documents"):  # what imports train.py
        from bench import documents, rehearsal, training

        sections = {"train": training, "rehearse": rehearsal, "documents": documents}
        sections = [sections[name].section]
        if name == "rehearse":
            options.rows = options.rows or rehearsal.usual_rows(options.rehearse)
        if torchrun or options.rehearse is not None:
            check_ranks(options, parser)
    if any(S < 2 for _, S in options.rows):
        refuse(parser, "--rows: sequences have at least 2 tokens, because the last has no target")
    if options.keep_blocks is not None and options.keep_blocks < 0:
        refuse(parser, f"--keep_blocks={options.keep_blocks}: 0 or more")
    if name not in ("train", "rehearse", "generate", "documents"):  # which take several sequences
        if any(sequences > 1 for sequences, _ in options.rows):
            launch = "torchrun --nproc_per_node 2 -m bench"
            parser.error(f"--rows: several sequences are for training: start it by {launch}")
        options.rows = [S for _, S in options.rows]
    if options.layers is None:
        options.layers = layers[0 if GPU else 1]
    try:
        config = replace(GPTOSSConfig() if GPU else TINY, num_hidden_layers=options.layers)
    except ValueError as error:
        parser.error(f"--layers: {error}")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    if GPU and torchrun:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    path = options.out / f"{name}.json"
    results = Results(path, machine=machine(), layers=options.layers, ceilings=[], rows=[])
    bare = "device", "dtype", "date"
    known = results["machine"].items()
    say(", ".join(f"{value}" if key in bare else f"{key} {value}" for key, value in known))
    if GPU:
        say(f"gpt-oss-20b's sizes, {options.layers} layers, random weights and tokens")
    else:
        tiny = f"a tiny model of {options.layers} layers"
        say(f"no GPU: {tiny} shows what this does, and its speeds mean nothing")
    if options.fast == "false":
        results.save(fast=False)
        say("by definition: the fast twins are off")
    with fast.plain() if options.fast == "false" else nullcontext():
        for section in sections:
            section(options, config, results)
    say(f"\nresults: {results.path}")


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, (settings, meaning) in OPTIONS.items():
        parser.add_argument(f"--{name}", help=meaning, **settings)
    kinds = parser.add_mutually_exclusive_group()
    for name, (settings, meaning) in KINDS.items():
        kinds.add_argument(f"--{name}", help=meaning, **settings)
    parser.add_argument("--curves", action="store_true", help="must come first; then train.py's")
    try:
        if arguments[:1] == ["--curves"]:
            return curves.main(arguments[1:])
        options = parser.parse_args(arguments)
        if options.curves:
            parser.error("--curves must come first, and train.py's arguments follow it")
        if options.profile and (options.plot or options.inspect or options.deterministic == "true"):
            parser.error("--profile is for a plain step, or for --rehearse")
        if options.plot:
            return plots.plot(options.out / "bench.json", options.plot)
        if options.inspect:
            return inspection.show(*options.inspect)
        measure(options, parser)
    except torch.OutOfMemoryError:
        raise SystemExit(
            "error: this GPU is too small for this: give fewer --layers, or shorter --rows"
        ) from None
    except ImportError as error:
        raise SystemExit(f"error: {error}: pip install {error.name}") from None


if __name__ == "__main__":
    main()
