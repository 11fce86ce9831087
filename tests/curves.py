"""The same training on one rank, on two that share every sequence, and on two that take turns at them: is the loss the same?

    python tests/curves.py                                            # configs/tiny.py, 50 steps, on the CPU's cores
    python tests/curves.py configs/gptoss_64k.py --seq_len=8192 ...   # any run that fits one GPU: train.py's arguments

Prints by how much the losses differ and draws them: docs/curves.png. The runs stay in runs/curves-*. At configs/tiny.py's own
learning rate, three times this one, a token at a tie in a router goes another way after some twenty steps, and the runs part.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure  # now, not after minutes of training

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = {
    "sp 1": (1, 1),
    "sp 2": (2, 2),
    "dp 2": (2, 1),
}  # ranks, and how many of them share a sequence


def losses(layout, arguments):
    """The losses of a run of train.py, step by step."""
    (ranks, sp), name = LAYOUTS[layout], f"curves-{layout.replace(' ', '')}"
    shutil.rmtree(f"runs/{name}", ignore_errors=True)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        ROOT / "train.py",
    ]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    subprocess.run(
        [*torchrun, *arguments, f"--sp={sp}", f"--name={name}"], check=True, env=environment
    )
    rows = map(json.loads, Path(f"runs/{name}/metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def main(arguments):
    arguments = arguments or [
        ROOT / "configs/tiny.py",
        "--steps=50",
        "--lr=1e-3",
        "--micro_batch=8",
        "--eval_every=0",
        "--sample=",
    ]
    curves = {layout: losses(layout, arguments) for layout in LAYOUTS}
    assert len({len(values) for values in curves.values()}) == 1, "a run ended early"
    apart = {
        layout: max(abs(a - b) / abs(b) for a, b in zip(values, curves["sp 1"]))
        for layout, values in curves.items()
    }
    for layout in list(curves)[1:]:
        print(
            f"{layout} against sp 1: {len(curves[layout])} losses, relative difference at most {apart[layout]:.1e}"
        )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (layout, values), style in zip(curves.items(), ("-", "--", ":")):
        axes.plot(
            values,
            style,
            label=f"{layout}, within {apart[layout]:.1e}" if apart[layout] else layout,
            linewidth=2,
        )
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(ROOT / "docs/curves.png", dpi=110)


if __name__ == "__main__":
    main(sys.argv[1:])
