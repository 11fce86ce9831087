"""What a run reports: a line per step on the screen, a JSON object per step in metrics.jsonl, a
plot of the loss, and, if asked, the same numbers to Weights & Biases."""

import dataclasses
import json
import math
import secrets
import time
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F

import fast
import lora
from loop.budget import flops_of, peak_flops
from loop.plan import arithmetic

HANDFUL = 5  # epochs; after more over the same data a model begins to know it by heart


class Log:
    """Every rank takes part in measuring; the first one writes."""

    def __init__(self, options, model, folder, device, data, held_out, step):
        """`step`: where this process begins. Earlier lines of it and of later steps are removed."""
        self.options, self.model, self.config = options, model, model.config
        self.device, self.data, self.peak_flops = device, data, peak_flops(device)
        self.writes, self.file, self.wandb = dist.get_rank() == 0, folder / "metrics.jsonl", None
        watch_experts(model)
        if not self.writes:
            return
        self.remove_from(step)
        settings = dataclasses.asdict(options) | dataclasses.asdict(self.config)
        settings |= {"tokenizer": data.tokenizer}
        if options.wandb:
            self.connect(settings)
        replace_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
        if options.lora_rank:
            self.say(lora.describe(options, model))
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.say(arithmetic(options, self.config, parameters, dist.get_world_size()))
        self.say(describe_plan(options, data))
        if held_out:
            self.say(f"held out: {held_out.describe()}")
        source = f"from {options.checkpoint}" if options.checkpoint else "random"
        self.say(f"goes on after step {step - 1}" if step else f"weights {source}")

    def connect(self, settings):
        """Start a run of Weights & Biases, or continue the one that config.json names."""
        import wandb

        with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
            settings["wandb_id"] = json.loads((self.file.parent / "config.json").read_bytes())[
                "wandb_id"
            ]
        settings.setdefault("wandb_id", secrets.token_hex(4))
        self.wandb = wandb.init(
            project="nano-gpt-oss",
            name=self.options.name,
            id=settings["wandb_id"],
            resume="allow",
            config=settings,
        )

    def say(self, text):
        if self.writes:
            print(text, flush=True)

    # ---- measuring

    def begin(self):
        """The step begins."""
        self.began = time.perf_counter()

    def step(self, batches, *, show, **values):
        """The step has ended: measure it, write its metrics, and print its line if it is due, or
        if `show`. `batches`: what data.batch returned to this rank."""
        frozen = self.options.lora_rank > 0
        flops = sum(flops_of(self.config, documents, frozen) for _, _, documents in batches)
        flops, imbalance = measure(self.model, flops / self.options.sp)  # waits for the GPU
        seconds = time.perf_counter() - self.began
        ranks, done = dist.get_world_size(), values["step"] + 1
        speed = self.options.batch_size * self.options.seq_len / seconds
        values |= {
            "epoch": done * self.options.batch_size / self.data.sequences_per_epoch,
            "expert_load": sum(imbalance) / len(imbalance),
            "expert_load_by_layer": imbalance,
            "ms": seconds * 1000,
            "tokens_per_s": speed,
            "tokens_per_s_per_rank": speed / ranks,
            "eta_s": seconds * (self.options.steps - done),
        }
        if self.peak_flops:
            values["mfu"] = flops / seconds / ranks / self.peak_flops
        if self.device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            # so far; each one stops the GPU for a while
            values["alloc_retries"] = torch.cuda.memory_stats()["num_alloc_retries"]
        if show or done % self.options.log_every == 0:
            self.say(format_line(values, self.options.steps))
        self.write(values)

    def evaluation(self, at, loss, better):
        """A held-out loss, of the model after at.step steps."""
        note = " (best so far)" if better else f" (best {at.best:.4f})" if at.best else ""
        self.say(f"step {at.step - 1:{width(self.options.steps)}} | held out {loss:.4f}{note}")
        if at.ended(self.options) and at.step < self.options.steps:
            waited = f"{at.waited} evaluations without a better one"
            self.say(f"ended after step {at.step - 1}: {waited}")
        self.write({"step": at.step - 1, "eval_loss": loss})
        self.plot()

    # ---- writing

    def write(self, values):
        if self.writes:
            with open(self.file, "a") as file:
                file.write(json.dumps(values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=values["step"])

    def lines(self):
        """(line, its numbers if it is one that this class wrote, else {}) of metrics.jsonl."""
        with suppress(FileNotFoundError):
            for line in self.file.read_bytes().splitlines(keepends=True):
                row = None
                with suppress(ValueError, RecursionError):
                    row = json.loads(line)
                ours = isinstance(row, dict) and type(row.get("step")) is int
                yield line, row if ours else {}

    def remove_from(self, step):
        """Remove what was logged of `step` and later ones, which come again, and the half line
        that a kill or a full disk may have left. Lines of others stay."""
        kept = [line for line, row in self.lines() if row.get("step", -1) < step]
        if kept and not kept[-1].endswith(b"\n"):
            kept.pop()
        if self.file.exists():
            replace_text(self.file, b"".join(kept))

    def plot(self):
        """Draw loss.png, if that can be done."""
        if not self.writes:
            return
        try:
            draw(self.file.with_name("loss.png"), [row for _, row in self.lines()])
        except ImportError:
            fast.say("loss.png is not drawn: matplotlib is not installed")
        except Exception as error:  # a full disk or a broken matplotlib must not fail the run
            self.say(f"loss.png was not drawn: {(str(error).splitlines() or [repr(error)])[0]}")


def draw(path, rows):
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure

    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "held out")):
        points = [(r["step"], r[key]) for r in rows if type(r.get(key)) in (int, float)]
        if points:
            axes.plot(*zip(*points), label=label, marker="o" if key == "eval_loss" else None)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(path, dpi=120)


def replace_text(path, content):
    """Write a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(content if isinstance(content, bytes) else content.encode())
    aside.replace(path)


# --------------------------------------------------------------------------------------------------
# Experts


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
    """(`flops` summed over all ranks; per layer the expert load since the last call, tokens of the
    busiest expert / of the average one)."""
    routers = [block.mlp.router for block in model.blocks]
    load = torch.stack([router.load for router in routers]).double()  # (layers, experts)
    numbers = torch.cat((load.flatten(), load.new_tensor([flops])))
    dist.all_reduce(numbers)
    for router in routers:
        router.load = 0
    load, flops = numbers[:-1].view_as(load), numbers[-1]
    return flops.item(), (load.amax(1) / load.mean(1)).tolist()


# --------------------------------------------------------------------------------------------------
# Words


def describe_plan(options, data):
    """How often the run will see its data."""
    per_epoch, per_step = data.sequences_per_epoch, options.batch_size
    epochs = options.steps * per_step / per_epoch
    plan = f"{data.describe()}\n{options.steps:,} steps of {per_step:,} sequences: "
    plan += f"{epochs:.3g} epochs of {per_epoch:,}"
    if epochs > HANDFUL:
        plan += f"\nwarning: {epochs:.0f} epochs over the same data; --epochs={HANDFUL} would be "
        plan += f"{math.ceil(HANDFUL * per_epoch / per_step):,} steps"
    return plan


def width(steps):
    """Digits of the largest step number."""
    return len(str(steps - 1))


def format_line(v, steps):
    """The line of a step, from its metrics."""
    parts = [
        f"step {v['step']:{width(steps)}}",
        f"loss {v['loss']:7.4f}",
        f"grad norm {v['grad_norm']:7.3f}",
        f"lr {v['lr']:.2e}",
        f"{v['ms']:6,.0f} ms",
        f"{v['tokens_per_s']:9,.0f} tok/s",
    ]
    if v["tokens_per_s"] != v["tokens_per_s_per_rank"]:
        parts[-1] += f" ({v['tokens_per_s_per_rank']:,.0f} per rank)"
    if "mfu" in v:
        parts.append(f"mfu {v['mfu']:5.1%}")
    if "peak_gib" in v:
        parts.append(f"{v['peak_gib']:5.1f} GiB")
    if v.get("alloc_retries"):
        parts.append(f"memory nearly full, {v['alloc_retries']} stops so far")
    parts += [f"load {v['expert_load']:.2f}", f"eta {timedelta(seconds=round(v['eta_s']))}"]
    return " | ".join(parts)
