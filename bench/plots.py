"""docs/bench.png, the README's figure, from the results of earlier runs: forward + backward beside
transformers, and next to it full training steps, if train.json is there."""

import hashlib
import json

from bench.report import length, say

OURS, THEIRS = "tab:blue", "0.55"  # in every figure: blue is ours, grey is what it is compared with
SPEED = "tokens_per_second"


def plot(path, image):
    """Draw bench.json at `path`, and train.json beside it, as `image`."""
    if not path.exists():
        raise SystemExit(
            f"error: {path} does not exist: run `python -m bench`, or name its folder by --out"
        )
    from matplotlib.figure import Figure

    files = [path, path.with_name("train.json")]
    texts = [file.read_text() for file in files if file.exists()]
    panels = list(zip((draw_speed, draw_training), map(json.loads, texts)))
    figure = Figure(figsize=(5.6 * len(panels), 3.9), layout="constrained")
    for axes, (draw, results) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, results)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=150, metadata={"Source": digest(texts)})
    say(f"{image} drawn from {path.parent}")


def digest(texts):
    """A short name of the results, kept in the picture: tests/test_readme.py sees whether the
    README's is drawn from those in docs/results."""
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def line(axes, points, place, color=OURS, **style):
    """Points (tokens, tokens per second), each with its number at `place` of it: an offset in
    typographic points, and "left", "center" or "right"."""
    axes.plot(*zip(*points), color=color, marker="o", markersize=5, linewidth=2, **style)
    for point, (_, following) in zip(points, [*points[1:], points[-1]]):
        over = (0, 11, "center") if following > point[1] and place[1] > 0 else place
        write(axes, f"{point[1]:,.0f}", point, over, color, "normal")


def write(axes, text, point, place, color=OURS, weight="bold"):
    """A line's name, or a number."""
    x, y, ha = place
    style = {"ha": ha, "va": "center", "color": color, "fontweight": weight}
    size = 10 if weight == "bold" else 9
    axes.annotate(text, point, (x, y), textcoords="offset points", fontsize=size, **style)


def finish(axes, lengths, title, subtitle):
    axes.set_xscale("log")
    axes.set(ylim=(0, 1.2 * axes.get_ylim()[1]), xlabel="tokens in a sequence", yticks=[])
    axes.set_xlim(min(lengths) / 1.4, max(lengths) * 1.6)
    axes.set_xticks(lengths, [length(S) for S in lengths])
    axes.minorticks_off()
    axes.tick_params(length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.set_title(f"{title}\n", loc="left", fontweight="bold", fontsize=11)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, color="0.35", fontsize=9)


def machine(results):
    known = results["machine"]
    device = known["device"].removeprefix("NVIDIA ").partition(",")[0]
    return f"{results.get('ranks', 1)} × {device}, {results['layers']} layers"


def draw_speed(axes, results):
    """Forward + backward, ours and transformers'."""
    rows, lengths = results["rows"], sorted({row["tokens"] for row in results["rows"]})
    speeds = {
        name: {row["tokens"]: row[SPEED] for row in rows if row["model"] == name and SPEED in row}
        for name in ("ours", "transformers")
    }
    ours, theirs = speeds.values()
    title = "Tokens per second against length"
    if ours:
        line(axes, list(ours.items()), (5, 9, "left"))
        write(axes, "ours", max(ours.items()), (5, 26, "left"))
    if theirs:
        ratios = [ours[S] / theirs[S] for S in theirs if S in ours]
        if ratios:
            title = f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as transformers"
        name = f"transformers {results['machine'].get('transformers', '')}"
        line(axes, list(theirs.items()), (0, -11, "center"), THEIRS)
        low = min(theirs.values())
        write(axes, name, (min(theirs), low), (-15, -28, "left"), THEIRS)
        failed = [row["tokens"] for row in rows if row["model"] != "ours" and "error" in row]
        if failed:
            write(axes, "out of memory", (min(failed), low), (-15, -28, "left"), THEIRS)
    finish(axes, lengths, title, f"tokens/s of forward + backward, {machine(results)}")


def draw_training(axes, results):
    """Full training steps, per GPU; a line for each number of ranks that share a sequence."""
    rows = [row for row in results["rows"] if SPEED in row]
    if not rows:
        return
    lengths = sorted({row["sequence"] for row in rows})
    for n in sorted({row["sp"] for row in rows}):
        points = [(row["sequence"], row[SPEED]) for row in rows if row["sp"] == n]
        if n == 1:
            line(axes, points, (5, 9, "left"), linestyle="--")
            write(axes, "each GPU its own sequences", points[0], (5, 26, "left"))
        else:
            line(axes, points, (-5, -10, "right"))
            middle = points[len(points) // 2]
            write(axes, f"{n} GPUs share each sequence", middle, (-45, -10, "right"))
    title = f"Every parameter trained, up to {length(lengths[-1])} tokens"
    finish(axes, lengths, title, f"tokens/s per GPU of full training steps, {machine(results)}")
