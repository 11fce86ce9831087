"""Every option of train.py, with its default and its meaning; how they are read; what must hold before a run may start.

A config file is Python that assigns some of them, `seq_len = 64 * 1024`; --name=value on the command line comes after it.
A config file is code, so run only those you trust.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from data import TokenData
from loop.memory import check_betas
from model import GPTOSS, GPTOSSConfig
from tokenizer import get_tokenizer
from weights import open_weights, weight_files


def option(default, meaning):
    return field(default=default, metadata={"meaning": meaning})


@dataclass
class Options(GPTOSSConfig):
    """Everything that can be set. The sizes of a model that starts from random weights are GPTOSSConfig's fields."""

    name: str = option("", "the run: its files go to runs/NAME; empty: the config file's name")
    resume: bool = option(False, "go on from the run's newest saved state, if it has one")
    seed: int = option(0, "of the random weights and the order of the data")
    checkpoint: str = option(
        "", "weights folder to start from, as convert_hf.py makes it; empty: random weights"
    )
    # data
    data: str = option("pydoc", "token folder made by data.py, or a built-in corpus")
    eval_data: str = option("", "the same, held out")
    seq_len: int = option(1024, "tokens of a row")
    batch_size: int = option(8, "rows of a step, over all ranks")
    micro_batch: int = option(1, "rows that pass a rank's model at a time")
    long_documents: str = option("cut", "documents longer than a row: cut into rows, or drop")
    # optimization
    steps: int = option(100, "updates of the weights")
    lr: float = option(1e-5, "highest learning rate")
    final_lr: float = option(0.1, "the last learning rate, as a share of the highest")
    warmup_steps: int = option(
        10, "steps over which the learning rate rises; then it falls as a cosine"
    )
    weight_decay: float = option(0.0, "of matrices; norms, biases and sinks are left alone")
    beta1: float = option(0.9, "Adam's memory of the gradient")
    beta2: float = option(0.95, "Adam's memory of its square")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no limit")
    bad_steps: int = option(
        5, "stop after so many updates in a row were skipped because a number was not finite"
    )
    # parallelism and memory
    sp: int = option(
        1,
        "ranks that share each sequence; the key-value heads and they must divide one way or the other",
    )
    replicas: int = option(1, "copies of the sharded model, one a node for example (HSDP)")
    dtype: str = option("auto", "of the computation: bfloat16, float32, or auto: bfloat16 on a GPU")
    optimizer: str = option(
        "fp32",
        "fp32: 16 bytes a parameter; split: 10, as exact but for bf16 moments; bf16: 8, loses small updates",
    )
    recompute: str = option(
        "all",
        "activations made again in the backward: none; all; attention: all but attention's output",
    )
    keep_blocks: int = option(
        0, "the last so many blocks recompute nothing: for memory that is left over"
    )
    offload: bool = option(
        False, "keep the blocks' inputs in host memory between forward and backward"
    )
    # evaluation, saving, output
    eval_every: int = option(0, "steps between evaluations, the last step always; 0: never")
    eval_rows: int = option(32, "rows of an evaluation")
    save_every: int = option(
        0, "steps between saved states, the last step always; 0: only when the run is told to stop"
    )
    keep: int = option(2, "saved states that stay")
    log_every: int = option(1, "steps between log lines")
    sample: str = option("", "prompt to continue when the run has ended")
    sample_tokens: int = option(200, "tokens of that sample")
    wandb: bool = option(False, "mirror the metrics to Weights & Biases")
    fast: bool = option(True, "the fast twins of fast.py; false: the model's plain definitions")
    dry_run: bool = option(False, "print what the run will need, per GPU, and leave; needs no GPU")
    rehearse: bool = option(
        False, "measure a few steps as one of --ranks ranks on this GPU; under torchrun as all"
    )
    ranks: int = option(1, "ranks of a dry run or a rehearsal, where torchrun does not say")
    gpu_gib: float = option(0.0, "memory of the GPUs that a dry run is for; 0: that of this one")
    gbps: float = option(350.0, "GB/s that a GPU of a rehearsal is taken to send")
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
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}"
                )
        may_be_zero = (
            "seed",
            "final_lr",
            "warmup_steps",
            "weight_decay",
            "beta1",
            "beta2",
            "grad_clip",
            "keep_blocks",
            "eval_every",
            "save_every",
            "gpu_gib",
        )
        for f in dataclasses.fields(self):
            value, zero = getattr(self, f.name), f.name in may_be_zero
            if f.type in (int, float) and not (0 < value < math.inf or (zero and value == 0)):
                raise ValueError(
                    f"{f.name}={value!r} must be {'zero or ' if zero else ''}positive, and finite"
                )
        if max(self.beta1, self.beta2) >= 1:
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be less than 1")
        if self.optimizer != "fp32":
            check_betas(self.beta1, self.beta2)
        if self.offload and (self.recompute == "none" or self.keep_blocks):
            raise ValueError(
                f"offload=True moves the blocks' inputs, and recompute={self.recompute}, keep_blocks={self.keep_blocks} keep "
                "more than those: choose recompute=attention or all, and keep_blocks=0"
            )
        if self.seed >= 2**31:
            raise ValueError(f"seed={self.seed} must be less than 2147483648")
        if Path(self.name).name != self.name or self.name == "..":
            raise ValueError(
                f"name={self.name!r} must be a plain name: the run's files go to runs/NAME"
            )


def parse(arguments, usage):
    """Options from a config file and --name=value, in that order. ValueError names what is wrong and what is near it."""
    meanings = {f.name: f for f in dataclasses.fields(Options)}
    if "--help" in arguments or "-h" in arguments:
        print(usage + "\n")
        for f in meanings.values():
            print(
                f"  --{f.name}={f.default}".ljust(36)
                + f.metadata.get("meaning", "a size of the model, see GPTOSSConfig")
            )
        raise SystemExit
    given, files = {}, [a for a in arguments if not a.startswith("-")]
    if len(files) > 1:
        raise ValueError(
            f"one config file, not {len(files)}: {' '.join(files)}; options are written --name=value"
        )
    for path in files:
        if not Path(path).is_file():
            raise ValueError(
                f"config file {path} does not exist; those that come with the project are in configs/"
            )
        given |= run_config(path)
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, value = argument[2:].partition("=")
            if not equals or not argument.startswith("--"):
                raise ValueError(f"{argument}: write --name=value")
            given[name] = (
                read_value(name, value, meanings[name].type) if name in meanings else value
            )
    for name, value in given.items():
        if name not in meanings:
            near = difflib.get_close_matches(name, meanings, 1)
            raise ValueError(
                f"there is no option {name}"
                + (f"; did you mean {near[0]}?" if near else "; see --help")
            )
        wanted = meanings[name].type
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(
                f"{name}={value!r} must be of type {wanted.__name__}, not {type(value).__name__}"
            )
    given["name"] = given.get("name") or (Path(files[0]).stem if files else "run")
    return Options(**given)


def run_config(path):
    """What a config file assigns, but for names with an underscore in front and modules."""
    try:
        assigned = runpy.run_path(path)
    except Exception as error:  # whatever the file does
        raise ValueError(f"config file {path}: {type(error).__name__}: {error}") from None
    return {
        k: v for k, v in assigned.items() if not k.startswith("_") and not isinstance(v, ModuleType)
    }


def read_value(name, text, kind):
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ValueError(
            f"--{name}={text}: expected {'true or false' if kind is bool else kind.__name__}"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# What must hold before a run may start


def model_config(options):
    sizes = {f.name: getattr(options, f.name) for f in dataclasses.fields(GPTOSSConfig)}
    if not options.checkpoint:
        return GPTOSSConfig(**sizes)
    positions = sizes.pop("max_position_embeddings")  # may be set, for more than it was trained on
    usual = dataclasses.asdict(GPTOSSConfig())
    if sizes != {name: usual[name] for name in sizes}:
        raise ValueError(
            f"checkpoint={options.checkpoint} brings its own sizes: leave those of the model alone"
        )
    path = Path(options.checkpoint) / "config.json"
    if (path.parent / "metrics.jsonl").exists():
        raise ValueError(
            f"checkpoint={options.checkpoint} is a run's folder: its weights, once it has ended, are in {path.parent / 'model'}"
        )
    if not path.exists():
        raise ValueError(
            f"checkpoint={options.checkpoint}: {path} does not exist; convert_hf.py makes checkpoints/NAME, and a run's weights "
            "are in runs/NAME/model; with --checkpoint= they are random"
        )
    config = GPTOSSConfig.from_json(path)
    if positions != usual["max_position_embeddings"]:
        config.max_position_embeddings = positions
    return config


def check_ranks(options, config, ranks):
    """ValueError if the options do not divide among the ranks."""
    if ranks % (options.sp * options.replicas):
        raise ValueError(
            f"sp={options.sp} times replicas={options.replicas} must divide the number of ranks, {ranks}: start more "
            "by torchrun --nproc_per_node, in a dry run by --ranks, or choose a smaller --sp"
        )
    rows = ranks // options.sp * options.micro_batch
    if options.batch_size % rows:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of {rows} = {ranks} ranks / sp x micro_batch"
        )
    if options.seq_len % options.sp:
        raise ValueError(f"sp={options.sp} must divide seq_len={options.seq_len}")
    if options.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"seq_len={options.seq_len} is longer than the model's {config.max_position_embeddings} positions"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % options.sp or (kv_heads % options.sp and options.sp % kv_heads):
        raise ValueError(
            f"sp={options.sp} must divide num_attention_heads={heads}, and divide num_key_value_heads={kv_heads} "
            f"or be a multiple of it"
        )


def check_new(options):
    """ValueError if the run's folder holds a run, unless this one goes on with it and can."""
    run = Path("runs") / options.name
    if (run / "model").exists() and not any((run / "states").glob("step-*")):
        raise ValueError(
            f"{run} already holds a run, which has ended and kept no state to go on from: --name=... starts another"
        )
    if (run / "metrics.jsonl").exists() and not options.resume:
        raise ValueError(
            f"{run} already holds a run: --resume=true goes on with it, --name=... starts another"
        )


def check_folder(options):
    """ValueError if the run's folder cannot be written."""
    run = Path("runs") / options.name
    place = next(path for path in (run, *run.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"{run}: cannot be written in {place.absolute()}: start in another folder, "
            "or choose another --name"
        )


def check_files(options, config):
    """The data and the held-out data, or None, of a run that has what it needs. ValueError if it has not: found by every rank
    alone, before they meet and before a GPU has work."""
    check_new(options)
    check_folder(options)
    gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if options.offload and not gpus:
        raise ValueError(
            "offload=True needs a GPU: without one there is no other memory than the host's"
        )
    in_fp32 = options.dtype == "float32" or (options.dtype == "auto" and not gpus)
    for name in ("hidden_size", "intermediate_size"):
        if getattr(config, name) % (4 if in_fp32 else 8):
            size = f"{name}={getattr(config, name)} must be a multiple of {4 if in_fp32 else 8}"
            raise ValueError(
                f"{size}: grouped matmuls want rows of 16 bytes, and the computation is in {'fp32' if in_fp32 else 'bf16'}"
            )
    if 0 < gpus < wanted:
        raise ValueError(
            f"--nproc_per_node {wanted}: this machine has {gpus} GPUs, and each rank needs one"
        )
    if options.eval_every and not options.eval_data:
        raise ValueError(
            f"eval_every={options.eval_every} has nothing to evaluate: name a corpus, --eval_data=..., or set it to 0"
        )
    if options.wandb and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb=True: install it with `pip install wandb`, or leave the option out")
    if options.checkpoint:
        layers, tensors = config.num_hidden_layers, len(weight_files(options.checkpoint))
        if layers > tensors:  # and do not build it: a forged number would fill the memory
            raise ValueError(
                f"{options.checkpoint}: config.json speaks of {layers} layers, the index of {tensors} tensors"
            )
        with torch.device("meta"):
            wanted = dict(GPTOSS(config).named_parameters())
        open_weights(wanted, options.checkpoint)
    order = {
        "seed": options.seed,
        "long_documents": options.long_documents,
        "vocab_size": config.vocab_size,
    }
    data = TokenData(options.data, options.seq_len, **order)
    if data.sequences_per_epoch < options.batch_size:
        raise ValueError(
            f"data={options.data} fills {data.sequences_per_epoch} sequences of seq_len={options.seq_len}, which is less than a step's "
            f"batch_size={options.batch_size}: use more data, or make one of the two smaller"
        )
    if options.checkpoint and data.vocab_size != config.vocab_size:
        raise ValueError(
            f"data={options.data} was encoded by {data.tokenizer} with a vocabulary of {data.vocab_size}, but "
            f"checkpoint={options.checkpoint} has one of {config.vocab_size}: encode it with the tokenizer it was trained with"
        )
    held_out = TokenData(options.eval_data, options.seq_len, **order) if options.eval_data else None
    if held_out and held_out.tokenizer != data.tokenizer:
        raise ValueError(
            f"eval_data={options.eval_data} was encoded by {held_out.tokenizer}, but data={options.data} by {data.tokenizer}: "
            f"encode both with one"
        )
    if options.sample:
        length, context = (
            len(get_tokenizer(data.tokenizer).encode(options.sample)),
            config.max_position_embeddings,
        )
        if length >= context:
            raise ValueError(
                f"sample={options.sample[:20]!r}...: {length} tokens, of which the model takes at most {context - 1}"
            )
    return data, held_out
