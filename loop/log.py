"""A run's metrics: a line a step on the screen, one JSON object a step in runs/NAME/metrics.jsonl, and a plot of the loss."""

import dataclasses
import json
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fast


def watch_expert_load(model):
    """Count the tokens that each layer's router sends to each expert in training, for
    take_expert_load."""

    def count(router, inputs, output):
        chosen, _ = output  # (N, k)
        if torch.is_grad_enabled() and not fast.replaying():
            router.load = router.load + F.one_hot(chosen, router.out_features).sum((0, 1))

    for block in model.blocks:
        block.mlp.router.load = 0  # becomes (E)
        block.mlp.router.register_forward_hook(count)


def take_expert_load(model):
    """Expert load imbalance since the last call: busiest / average, averaged over layers."""
    load = torch.stack([block.mlp.router.load for block in model.blocks]).double()  # (layers, E)
    dist.all_reduce(load)
    for block in model.blocks:
        block.mlp.router.load = 0
    return (load.amax(1) / load.mean(1)).mean().item()


class Log:
    """A line a step on the terminal, and as one JSON object in runs/NAME/metrics.jsonl. The first rank's business."""

    def __init__(self, options, folder, step):
        self.writes, self.file, self.wandb = dist.get_rank() == 0, folder / "metrics.jsonl", None
        if self.writes and self.file.exists():  # without what was logged of steps that come again
            kept = "".join(json.dumps(row) + "\n" for row in self.read() if row["step"] < step)
            aside = self.file.with_name(".metrics.partial")
            aside.write_text(kept)
            aside.replace(self.file)
        if self.writes and options.wandb:
            import wandb

            self.wandb = wandb.init(
                project="nano-gpt-oss", name=options.name, config=dataclasses.asdict(options)
            )

    def say(self, text):
        if self.writes:
            print(text, flush=True)

    def read(self):
        """The objects in metrics.jsonl. A kill or a full disk may have left half a line."""
        rows = []
        for line in self.file.read_text().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def metrics(self, values):
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def plot(self):
        """Draw loss.png if matplotlib is installed."""
        if not self.writes:
            return
        try:
            import matplotlib

            matplotlib.use("agg")
            from matplotlib import pyplot
        except ImportError:
            return
        rows = self.read()
        figure, axes = pyplot.subplots(figsize=(7, 4))
        for key, label in (("loss", "training"), ("eval_loss", "held out")):
            if points := [(r["step"], r[key]) for r in rows if key in r]:
                axes.plot(*zip(*points), label=label, marker="o" if key == "eval_loss" else None)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
        try:
            figure.savefig(self.file.with_name("loss.png"), dpi=120, bbox_inches="tight")
        except (
            Exception
        ) as error:  # a full disk, a matplotlib that is set up otherwise: no reason to fail a run
            self.say(f"loss.png was not drawn: {str(error).splitlines()[0]}")


def format_line(v):
    """A step's metrics as a line."""
    parts = [
        f"step {v['step']}",
        f"loss {v['loss']:.4f}",
        f"norm {v['grad_norm']:.3f}",
        f"lr {v['lr']:.2e}",
        f"{v['ms']:.0f} ms",
    ]
    parts.append(f"{v['tokens_per_s']:,.0f} tok/s ({v['tokens_per_s_per_rank']:,.0f} a rank)")
    if "mfu" in v:
        parts.append(f"mfu {v['mfu']:.1%}")
    if "peak_gib" in v:
        parts.append(f"{v['peak_gib']:.1f} GiB")
    if v.get("alloc_retries"):
        parts.append(f"memory nearly full, {v['alloc_retries']} stops so far")
    parts += [f"load {v['expert_load']:.2f}", f"eta {timedelta(seconds=round(v['eta_s']))}"]
    return " | ".join(parts)
