"""What each optimisation is worth: a step as it is, and with one optimisation off or one size
changed.

    python -m bench --ablation                      # 8K and 32K tokens, 6 of the 20b's layers
    python -m bench --ablation --rows=64K --layers=24

Prints how much longer the step takes after each change, and how much more memory; results also go
to runs/bench/ablation.json. Without a GPU a tiny model shows that it runs, and its times mean
nothing."""

from unittest.mock import patch

import fast
import flash
import model as gptoss
from bench.common import GPU
from bench.report import say_row
from bench.speed import build_ours, rows_of

ATTENTION = {
    "flex_sink_attention",
    "cudnn_sink_attention",
    "document_attention",
}  # uncompiled, Flex makes S x S scores
# frozen.py has others, which do not run here
PAIRS = [name for name, (definition, _) in fast.PAIRS.items() if definition.__module__ == "model"]
LEAVES = {name for name in fast.SWITCHES if any(hasattr(m, name) for m in (gptoss, fast, flash))}
LEAVES -= {*PAIRS, *ATTENTION}


def off(*names):
    return lambda: fast.plain(*names)


def size(**sizes):
    return lambda: patch.multiple(fast, **sizes)


def replayed_in_full():
    """A recomputed block runs twice the same, also what only its output needs."""
    return patch.object(fast, "replaying", lambda: False)


CHANGES = [  # (what is changed, recompute, context)
    *((f"{name} by definition", "none", off(name)) for name in PAIRS),
    ("leaves as written, not compiled", "none", off(*LEAVES)),
    ("FlexAttention on full layers, not cuDNN", "none", off("cudnn_sink_attention")),
    ("recomputed blocks run in full", "all", replayed_in_full),
    ("LOSS_TOKENS = 1024", "none", size(LOSS_TOKENS=1024)),
    ("LOSS_TOKENS = 4096", "none", size(LOSS_TOKENS=4096)),
    ("EXPERT_TOKENS = 8192", "none", size(EXPERT_TOKENS=8192)),
]
COLUMNS = [
    ("change", "what", "<40"),
    ("tokens", "row", ">8"),
    ("recompute", "recompute", ">11"),
    ("s", "seconds", ">9.4f"),
    ("longer by", "longer", ">11.1%"),
    ("peak GiB", "peak_gib", ">10.1f"),
    ("more by", "more_gib", ">9.1f"),
]


def section(options, config, results):
    model = build_ours(config)

    def measure(what, S, recompute, unchanged=None):
        """A row, compared with the row `unchanged` if that is given."""
        (row,) = rows_of("ours", model, config, [S], recompute)
        row["what"] = what
        if unchanged and "error" not in row and "error" not in unchanged:
            row["longer"] = row["seconds"] / unchanged["seconds"] - 1
            row["more_gib"] = row["peak_gib"] - unchanged["peak_gib"] if GPU else None
        results.add("rows", row)
        say_row(COLUMNS, row)
        return row

    say_row(COLUMNS)
    for S in options.rows:
        plain = measure("none", S, "none")
        unchanged = {"none": plain}
        for recompute in "attention", "all":
            unchanged[recompute] = measure("none", S, recompute, plain)
        for what, recompute, change in CHANGES:
            with change():
                measure(what, S, recompute, unchanged[recompute])
