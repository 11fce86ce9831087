"""docs/bench.png: tokens per second and peak memory against length, from the results of an earlier
run."""

import json
import math

from bench.report import length, say


def plot(path, image):
    if not path.exists():
        raise SystemExit(
            f"error: {path} does not exist: run `python -m bench`, or name its folder by --out"
        )
    from matplotlib.figure import Figure

    results = json.loads(path.read_text())
    rows = [row for row in results["rows"] if "error" not in row]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    floors = [
        (row["tokens"], row["tokens"] / row["own_floor_seconds"]) for row in rows if "floor" in row
    ]
    if floors:
        speed.plot(*zip(*floors), color="0.6", linestyle="--", label="floor of what ours computes")
    for axes, title, key in (
        (speed, "tokens per second", "tokens_per_second"),
        (memory, "peak memory, GiB", "peak_gib"),
    ):
        for name, color in ("ours", "tab:blue"), ("transformers", "tab:orange"):
            points = [(row["tokens"], row[key] or math.nan) for row in rows if row["model"] == name]
            if points:
                axes.plot(*zip(*points), color=color, marker="o", label=name)
        lengths = sorted({row["tokens"] for row in results["rows"]})
        axes.set(title=title, xlabel="tokens in the sequence", xscale="log", ylim=(0, None))
        axes.set_xticks(lengths, [length(S) for S in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    device = results["machine"]["device"]
    figure.suptitle(f"forward + backward, {results['layers']} layers, {device}")
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150)
    say(f"{image} drawn from {path}")
