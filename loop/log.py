"""What a run reports: a line per step on the screen, a JSON object per step in metrics.jsonl, a
plot of the loss, and, if asked, the same numbers to Weights & Biases."""

import dataclasses
import json
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fast
from loop.budget import flops_of, peak_flops
from loop.plan import arithmetic


class Log:
    """Every rank takes part in measuring; the first one writes."""

    def __init__(self, options, model, folder, device, data, step):
        """`step`: where this process begins. Earlier lines of it and of later steps are removed."""
        self.options, self.model, self.config = options, model, model.config
        self.device, self.peak_flops = device, peak_flops(device)
        self.writes, self.file, self.wandb = dist.get_rank() == 0, folder / "metrics.jsonl", None
        watch_experts(model)
        if not self.writes:
            return
        settings = dataclasses.asdict(options) | {"tokenizer": data.tokenizer}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        if self.file.exists():
            kept = "".join(json.dumps(row) + "\n" for row in self.read() if row["step"] < step)
            aside = self.file.with_name(".metrics.partial")
            aside.write_text(kept)
            aside.replace(self.file)
        if options.wandb:
            import wandb

            settings = dataclasses.asdict(options)
            self.wandb = wandb.init(project="nano-gpt-oss", name=options.name, config=settings)
        parameters = sum(p.numel() for p in model.parameters())
        self.say(arithmetic(options, self.config, parameters, dist.get_world_size()))
        self.say(data.describe())
        source = f"from {options.checkpoint}" if options.checkpoint else "random"
        self.say(f"goes on after step {step - 1}" if step else f"weights {source}")

    def say(self, text):
        if self.writes:
            print(text, flush=True)

    def begin(self):
        """The step begins."""
        self.began = time.perf_counter()

    def step(self, batches, *, show, **values):
        """The step has ended: measure it, write its metrics, and print its line if it is due, or
        if `show`. `batches`: what data.batch returned to this rank."""
        flops = sum(flops_of(self.config, documents) for _, _, documents in batches)
        flops, imbalance = measure(self.model, flops / self.options.sp)  # waits for the GPU
        seconds, ranks = time.perf_counter() - self.began, dist.get_world_size()
        speed = self.options.batch_size * self.options.seq_len / seconds
        values |= {
            "expert_load": imbalance,
            "ms": seconds * 1000,
            "tokens_per_s": speed,
            "tokens_per_s_per_rank": speed / ranks,
            "eta_s": seconds * (self.options.steps - values["step"] - 1),
        }
        if self.peak_flops:
            values["mfu"] = flops / seconds / ranks / self.peak_flops
        if self.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            # so far; each one stops the GPU for a while
            values["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        if show or (values["step"] + 1) % self.options.log_every == 0:
            self.say(format_line(values))
        self.metrics(values)

    def evaluation(self, step, loss):
        self.say(f"step {step} | held out {loss:.4f}")
        self.metrics({"step": step, "eval_loss": loss})

    def metrics(self, values):
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def read(self):
        """The objects in metrics.jsonl. A kill or a full disk may have left half a line."""
        rows = []
        for line in self.file.read_text().splitlines():
            with suppress(ValueError):
                rows.append(json.loads(line))
        return rows

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
        except Exception as error:  # a full disk or a broken matplotlib must not fail the run
            self.say(f"loss.png was not drawn: {str(error).splitlines()[0]}")


def watch_experts(model):
    """Count the tokens that each layer's router sends to each expert in training, for measure()."""

    def count(router, inputs, output):
        chosen, _ = output  # (N, k)
        if torch.is_grad_enabled() and not fast.replaying():
            router.load = router.load + F.one_hot(chosen, router.out_features).sum((0, 1))

    for block in model.blocks:
        block.mlp.router.load = 0  # becomes (experts)
        block.mlp.router.register_forward_hook(count)


def measure(model, flops):
    """(`flops` summed over all ranks, expert load imbalance since the last call: tokens of the
    busiest expert / of the average one, averaged over layers)."""
    routers = [block.mlp.router for block in model.blocks]
    load = torch.stack([router.load for router in routers]).double()  # (layers, experts)
    numbers = torch.cat((load.flatten(), load.new_tensor([flops])))
    dist.all_reduce(numbers)
    for router in routers:
        router.load = 0
    load, flops = numbers[:-1].view_as(load), numbers[-1]
    return flops.item(), (load.amax(1) / load.mean(1)).mean().item()


def format_line(v):
    """The line of a step, from its metrics."""
    parts = [
        f"step {v['step']}",
        f"loss {v['loss']:.4f}",
        f"grad norm {v['grad_norm']:.3f}",
        f"lr {v['lr']:.2e}",
        f"{v['ms']:.0f} ms",
        f"{v['tokens_per_s']:,.0f} tok/s ({v['tokens_per_s_per_rank']:,.0f} per rank)",
    ]
    if "mfu" in v:
        parts.append(f"mfu {v['mfu']:.1%}")
    if "peak_gib" in v:
        parts.append(f"{v['peak_gib']:.1f} GiB")
    if v.get("alloc_retries"):
        parts.append(f"memory nearly full, {v['alloc_retries']} stops so far")
    parts += [f"load {v['expert_load']:.2f}", f"eta {timedelta(seconds=round(v['eta_s']))}"]
    return " | ".join(parts)
