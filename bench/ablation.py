"""What each optimisation is worth: a step as it is, and with one optimisation off or one size
changed.

    python -m bench --ablation                      # 8K and 32K tokens, 6 of the 20b's layers
    python -m bench --ablation --rows=64K --layers=24

Prints how much longer the step takes after each change, and how much more memory; results also go
to runs/bench/ablation.json. Without a GPU a tiny model shows that it runs, and its times mean
nothing."""

from contextlib import ExitStack, contextmanager
from unittest.mock import PropertyMock, patch

import fast
import model as gptoss
from bench.common import GPU
from bench.report import say_row
from bench.speed import build_ours, rows_of

MUST_COMPILE = "flex_sink_attention"  # not compiled, FlexAttention makes S x S scores


def is_fused(value):
    return getattr(value, "__code__", None) is fast.fused(is_fused).__code__


def fused_leaves():
    """{(module, name)} of all @fused functions that can run as written."""
    return {
        (module, name)
        for module in (gptoss, fast)
        for name, value in vars(module).items()
        if is_fused(value) and name != MUST_COMPILE
    }


@contextmanager
def uncompiled():
    """Every @fused leaf runs as written, also as the fast twin of a definition."""
    with ExitStack() as stack:
        for module, name in fused_leaves():
            leaf = getattr(module, name)
            stack.enter_context(patch.object(module, name, leaf.__wrapped__))
        pairs = {
            name: (definition, twin.__wrapped__)
            for name, (definition, twin) in fast.PAIRS.items()
            if is_fused(twin)
        }
        stack.enter_context(patch.dict(fast.PAIRS, pairs))
        yield


def size(**sizes):
    return lambda: patch.multiple(fast, **sizes)


def without_cudnn():
    return patch.object(fast, "cudnn_refuses", lambda *_: "it is left out")


def replayed_in_full():
    """A recomputed block runs the same the second time: nothing that only its output needs is
    skipped."""
    never = PropertyMock(return_value=False)
    return patch.object(fast.Recompute, "replaying", never, create=True)


def pair_off(name):
    return lambda: fast.plain(name)


# (what is changed, recompute, context)
PAIRS_OFF = [(f"{name} by definition", "none", pair_off(name)) for name in fast.PAIRS]
CHANGES = [
    *PAIRS_OFF,
    ("leaves as written, not compiled", "none", uncompiled),
    ("FlexAttention on full layers, not cuDNN", "none", without_cudnn),
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
