"""Every option of train.py, with its default and its meaning, and how they are read.

A config file is Python that assigns some of them, `seq_len = 64 * 1024`; --name=value on the command line comes after it.
A config file is code, so run only those you trust.
"""

import dataclasses
import difflib
import math
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from model import GPTOSSConfig


def option(default, meaning):
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class Options(GPTOSSConfig):
    """Everything that can be set. The sizes of a model that starts from random weights are GPTOSSConfig's fields."""

    name: str = option("", "the run: its files go to runs/NAME; empty: the config file's name")
    resume: bool = option(False, "go on from the run's newest saved state, if it has one")
    seed: int = option(0, "of the random weights and the order of the data")
    checkpoint: str = option("", "weights folder to start from, as convert_hf.py makes it; empty: random weights")
    # data
    data: str = option("pydoc", "token folder made by data.py, or a built-in corpus")
    eval_data: str = option("", "the same, held out")
    seq_len: int = option(1024, "tokens of a row")
    batch_size: int = option(8, "rows of a step, over all ranks")
    micro_batch: int = option(1, "rows that pass a rank's model at a time")
    long_documents: str = option("cut", "documents longer than a row: cut into rows, or drop")
    # optimization
    steps: int = option(100, "updates")
    lr: float = option(1e-5, "highest learning rate")
    final_lr: float = option(0.1, "the last learning rate, as a share of the highest")
    warmup_steps: int = option(10, "steps over which the learning rate rises; then it falls as a cosine")
    weight_decay: float = option(0.0, "of matrices; norms, biases and sinks are left alone")
    beta1: float = option(0.9, "Adam's memory of the gradient")
    beta2: float = option(0.95, "Adam's memory of its square")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    bad_steps: int = option(5, "stop after so many updates in a row were skipped because a number was not finite")
    # parallelism and memory
    sp: int = option(1, "ranks that share each sequence; the key-value heads and they must divide one way or the other")
    replicas: int = option(1, "copies of the sharded model, one a node for example (HSDP)")
    dtype: str = option("auto", "of the computation: bfloat16, float32, or auto: bfloat16 on a GPU")
    optimizer: str = option(
        "fp32", "fp32: 16 bytes a parameter; split: 10, as exact but for bf16 moments; bf16: 8, loses small updates"
    )
    recompute: str = option("all", "activations made again in the backward: none, all, or all but the output of attention")
    offload: bool = option(False, "keep the blocks' inputs in host memory between forward and backward")
    # evaluation, saving, output
    eval_every: int = option(0, "steps between evaluations, the last step always; 0: never")
    eval_rows: int = option(32, "rows of an evaluation")
    save_every: int = option(0, "steps between saved states; 0: only when the run ends or is told to")
    keep: int = option(2, "saved states that stay")
    log_every: int = option(1, "steps between log lines")
    sample: str = option("", "prompt to continue when the run has ended")
    sample_tokens: int = option(200, "tokens of that sample")
    wandb: bool = option(False, "mirror the metrics to Weights & Biases")
    dry_run: bool = option(False, "print what the run will need, per GPU, and leave; needs no GPU")
    ranks: int = option(1, "ranks of a dry run, where torchrun does not say")
    deterministic: bool = option(False, "bitwise the same on every run, and slower")
    timeout: int = option(600, "seconds after which ranks give up waiting for each other")

    def __post_init__(self):
        super().__post_init__()
        choices = {
            "long_documents": ("cut", "drop"),
            "dtype": ("auto", "bfloat16", "float32"),
            "optimizer": ("fp32", "split", "bf16"),
            "recompute": ("none", "all", "attention"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        for name in ("seq_len", "batch_size", "micro_batch", "steps", "lr", "sp", "replicas", "keep", "log_every", "timeout"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive")
        for name in ("final_lr", "warmup_steps", "weight_decay", "beta1", "beta2", "grad_clip", "eval_every", "save_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative or infinite")


def parse(arguments, usage):
    """Options from a config file and --name=value, in that order. ValueError names what is wrong and what is near it."""
    meanings = {f.name: f for f in dataclasses.fields(Options)}
    if "--help" in arguments or "-h" in arguments:
        print(usage + "\n")
        for f in meanings.values():
            print(f"  --{f.name}={f.default}".ljust(36) + f.metadata.get("meaning", "a size of the model, see GPTOSSConfig"))
        raise SystemExit
    given, files = {"name": "run"}, [a for a in arguments if not a.startswith("--")]
    if len(files) > 1:
        raise ValueError(f"one config file, not {len(files)}: {' '.join(files)}; options are written --name=value")
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"config file {path} does not exist; those that come with the project are in configs/")
        given["name"] = Path(path).stem
        given |= {k: v for k, v in runpy.run_path(path).items() if not k.startswith("_") and not isinstance(v, ModuleType)}
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if not equals:
                raise ValueError(f"{argument}: write --name=value")
            given[name] = read_value(name, value, meanings[name].type) if name in meanings else value
    for name, value in given.items():
        if name not in meanings:
            near = difflib.get_close_matches(name, meanings, 1)
            raise ValueError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        wanted = meanings[name].type
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f"{name}={value!r} must be of type {wanted.__name__}, not {type(value).__name__}")
    return Options(**given)


def read_value(name, text, kind):
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(f"--{name}={text}: expected {'true or false' if kind is bool else kind.__name__}") from None
