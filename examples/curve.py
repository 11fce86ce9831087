"""Draw the rewards that runs of grpo.py wrote, one line of metrics.jsonl per run.

python -m examples.curve docs/grpo.png docs/results/grpo-*.jsonl
"""

import hashlib
import json
import sys
from pathlib import Path


def digest(files):
    """A short name of the results, kept in the picture: a test sees that they belong together."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def main(picture, *files):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("examples.curve draws with matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, file in enumerate(files):
        rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
        for key, style in ("reward", {"alpha": 0.35}), ("aside", {"marker": "o"}):
            points = [(row["step"], row[key]) for row in rows if key in row]
            axes.plot(*zip(*points), color=f"C{number}", **style)
    axes.plot([], [], color="0.3", marker="o", label="questions kept aside")
    axes.plot([], [], color="0.3", alpha=0.35, label="questions learned from")
    axes.set(xlabel="step", ylabel="mean reward", ylim=(0, 1), title=f"GRPO, {len(files)} seeds")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(picture, dpi=150, metadata={"Source": digest(files)})


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("name a picture and files: python -m examples.curve PICTURE FILE ...")
    main(*sys.argv[1:])
