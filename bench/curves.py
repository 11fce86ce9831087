"""The same training on one rank, on two that share every sequence (sp 2), and on two that split the
batch (dp 2): are the losses equal?

    python -m bench --curves                                      # configs/tiny.py, 50 steps
    python -m bench --curves configs/gptoss_64k.py --steps=9 ...  # any run, by train.py's arguments

Prints the largest relative difference of the losses and draws them: runs/curves.png. The runs stay
in runs/curves-*. The default learning rate is a third of that of configs/tiny.py, at which the runs
part after some twenty steps: rounding flips a near-tied routing choice."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from bench.report import say

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {"sp 1": (1, 1), "sp 2": (2, 2), "dp 2": (2, 1)}  # ranks, ranks per sequence
DEFAULT = "--steps=50 --lr=1e-3 --micro_batch=8 --eval_every=0 --sample="


def losses(layout, arguments):
    """The losses of a run of train.py, step by step."""
    (ranks, sp), name = LAYOUTS[layout], f"curves-{layout.replace(' ', '')}"
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    command = [*launcher, ROOT / "train.py", *arguments, f"--sp={sp}", f"--name={name}"]
    subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
    lines = map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main(arguments, image=Path("runs/curves.png")):
    from matplotlib.figure import Figure  # now, not after minutes of training

    arguments = arguments or [ROOT / "configs/tiny.py", *DEFAULT.split()]
    curves = {layout: losses(layout, arguments) for layout in LAYOUTS}
    if len({len(values) for values in curves.values()}) > 1:
        raise SystemExit("error: a run ended early, see above")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (layout, values), style in zip(curves.items(), ("-", "--", ":")):
        apart = max(abs(a - b) / abs(b) for a, b in zip(values, curves["sp 1"]))
        if layout != "sp 1":
            said = f"{len(values)} losses, relative difference at most {apart:.1e}"
            say(f"{layout} against sp 1: {said}")
        label = f"{layout}, within {apart:.1e}" if apart else layout
        axes.plot(values, style, label=label, linewidth=2)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(image, dpi=110)
