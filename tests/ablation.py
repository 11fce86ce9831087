"""What the optimisations of model.py are worth: a step as it is, and with the usual way, or another size, in the place of one.

    python tests/ablation.py                            # 8K and 32K tokens, 6 of the 20b's layers, on a GPU
    python tests/ablation.py --rows=64K --layers=24

Prints how much longer the step takes after each change, and how much more memory; results also go to runs/ablation/ablation.json.
Without a GPU a tiny model shows that it runs, and its times mean nothing.
"""

import argparse
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench  # noqa: E402
import model as gptoss  # noqa: E402

LEAVES = [
    "rms_norm",
    "split_and_rotate",
    "fold_sinks",
    "sink_gradient",
    "swiglu",
    "swiglu_backward_",
    "combine",
    "gather_sum",
]
LEAVES += [
    "pick_logprobs",
    "logits_gradient_",
]  # all that is @fused, but for FlexAttention, which must be


def experts_by_autograd(x, experts, weights, w1, b1, w2, b2, limit, keep_hidden):
    k = experts.shape[1]
    order, expert, ends, _ = gptoss.sort_by_expert(experts, len(w1))
    h = F.grouped_mm(x[order // k], w1, offs=ends)
    y = F.grouped_mm(gptoss.swiglu(h, b1, expert, limit), w2, offs=ends) + b2[expert]
    return torch.zeros_like(x).index_add_(
        0, order // k, (y * weights.flatten()[order, None]).to(x.dtype)
    )


def router_in_fp32(x, weight, bias):
    return F.linear(x.float(), weight.float(), bias.float())


def loss_in_the_backward(x, weight, targets, count):
    return -gptoss.LogProbs.apply(x, weight, targets).sum() / count


def instead(**names):
    """A context in which names of model.py mean something else; `Name__apply` is the `apply` of an autograd function."""
    context = ExitStack()
    for name, value in names.items():
        owner, _, attribute = name.rpartition("__")
        context.enter_context(
            patch.object(getattr(gptoss, owner) if owner else gptoss, attribute, value)
        )
    return context


class NeverReplaying(gptoss.Recompute):
    """A second run like the first."""

    replaying = property(lambda self: False, lambda self, value: None)


CHANGES = [  # what, what is recomputed beside it, and how
    (
        "leaves as written, not compiled",
        "none",
        lambda: instead(**{name: getattr(gptoss, name).__wrapped__ for name in LEAVES}),
    ),
    (
        "FlexAttention on full layers, not cuDNN",
        "none",
        lambda: instead(cudnn_refuses=lambda *_: "it is left out"),
    ),
    ("experts by autograd", "none", lambda: instead(ExpertsFunction__apply=experts_by_autograd)),
    ("experts again in the second run", "all", lambda: instead(Recompute=NeverReplaying)),
    ("router in fp32", "none", lambda: instead(RouterLogits__apply=router_in_fp32)),
    (
        "loss's gradient in the backward",
        "none",
        lambda: instead(CrossEntropy__apply=loss_in_the_backward),
    ),
    ("LOSS_ROWS = 1024", "none", lambda: instead(LOSS_ROWS=1024)),
    ("LOSS_ROWS = 4096", "none", lambda: instead(LOSS_ROWS=4096)),
    ("EXPERT_TOKENS = 8192", "none", lambda: instead(EXPERT_TOKENS=8192)),
]
COLUMNS = [
    ("change", "what", "<40"),
    ("tokens", "row", ">8"),
    ("recompute", "recompute", ">11"),
    ("s", "seconds", ">9.4f"),
]
COLUMNS += [
    ("longer by", "longer", ">11.1%"),
    ("peak GiB", "peak_gib", ">10.1f"),
    ("more by", "more_gib", ">9.1f"),
]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=bench.parse_rows, default="8K,32K" if bench.GPU else "64", help="lengths"
    )
    parser.add_argument("--layers", type=int, default=6 if bench.GPU else 2)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    options = parser.parse_args(arguments)
    config = replace(
        gptoss.GPTOSSConfig() if bench.GPU else bench.TINY, num_hidden_layers=options.layers
    )
    results = bench.Results(
        options.out / "ablation.json", machine=bench.machine(), layers=options.layers, rows=[]
    )
    bench.say(
        f"{results['machine']['device']}, torch {torch.__version__}, {options.layers} layers, forward and backward"
    )
    bench.say_row(COLUMNS)
    model = bench.build_ours(config)

    def measure(what, S, recompute, unchanged=None):
        """A row; with `unchanged`, the row of the model as it is, also how it stands to that."""
        (row,) = bench.rows_of("ours", model, config, [S], recompute)
        row["what"] = what
        if unchanged and "error" not in row and "error" not in unchanged:
            row["longer"] = row["seconds"] / unchanged["seconds"] - 1
            row["more_gib"] = row["peak_gib"] - unchanged["peak_gib"] if bench.GPU else None
        results.add("rows", row)
        bench.say_row(COLUMNS, row)
        return row

    for _, S in options.rows:
        unchanged = {recompute: measure("none", S, recompute) for recompute in ("none", "all")}
        for what, recompute, change in CHANGES:
            with change():
                measure(what, S, recompute, unchanged[recompute])


if __name__ == "__main__":
    main()
