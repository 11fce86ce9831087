"""Every option of train.py, with its default and its meaning, and how options are read.

A config file is Python that assigns some of them, `seq_len = 64 * 1024`. Options on the command
line win over it: --name=value, --name value, or --name alone for a switch.
"""

import dataclasses
import difflib
import math
import runpy
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from fast import say
from folders import exists
from model import GPTOSSConfig
from weights import find_model


def option(default, meaning):
    return field(default=default, metadata={"meaning": meaning})


def heading(text, default, meaning):
    """An option that begins a part of --help."""
    return field(default=default, metadata={"meaning": meaning, "heading": text})


@dataclass
class Options(GPTOSSConfig):
    """Everything that can be set. GPTOSSConfig's fields are the sizes of a model that starts from
    random weights."""

    name: str = heading("The run", "", "files go to runs/NAME; empty: the config file's name")
    resume: bool = option(False, "continue from the run's newest saved state, if there is one")
    steps: int = option(100, "updates of the weights")
    epochs: float = option(0.0, "passes over the data, instead of steps")
    seed: int = option(0, "of random weights and of the order of the data")
    dry_run: bool = option(False, "print what the run will need per GPU, and leave; needs no GPU")
    rehearse: bool = option(False, "measure some steps as one of --ranks ranks on this GPU")

    checkpoint: str = heading("Model and data", "", "weights to start from; empty: random weights")
    data: str = option("pydoc", "corpus: a folder written by data.py, or pydoc, built in")
    seq_len: int = option(1024, "tokens per sequence")
    batch_size: int = option(8, "sequences per step, over all ranks")
    micro_batch: int = option(1, "sequences that pass a rank's model at a time")

    lr: float = heading("Optimization", 1e-5, "highest learning rate; ends at a tenth of it")
    warmup_steps: int = option(10, "steps in which the learning rate rises; then half a cosine")
    weight_decay: float = option(0.0, "of matrices; norms, biases and sinks have none")
    grad_clip: float = option(1.0, "largest gradient norm; 0: no limit")
    optimizer: str = option("fp32", "AdamW. fp32: 16 bytes per parameter; split: 10, moments bf16")

    lora_rank: int = heading("Low-rank adapters", 0, "their rank; 0: every weight is trained")
    lora_alpha: float = option(32.0, "what adapters add is multiplied by alpha / rank")
    lora_targets: str = option(
        "attention",
        "attention (qkv, out), experts (gate_up, down), router, all, (un)embedding",
    )
    lora_layers: str = option("", "layers that have adapters, as in 0-3,12; empty: all")
    frozen: str = option("bf16", "experts under adapters: bf16, or mxfp4, packed as released")
    shard_frozen: bool = option(False, "split frozen weights over the ranks; false: a copy on each")

    ranks: int = heading("GPUs and memory", 1, "of a dry run or a rehearsal; torchrun's count wins")
    gpu_gib: float = option(0.0, "memory to use of each GPU; 0: all. A dry run plans for it")
    gbps: float = option(350.0, "GB/s that each GPU of a rehearsal is taken to send")
    sp: int = option(1, "ranks that share each sequence (Ulysses)")
    replicas: int = option(1, "copies of the sharded model, one per node for example (HSDP)")
    recompute: str = option("all", "activations the backward recomputes: none, attention or all")
    keep_blocks: int = option(0, "last blocks that recompute nothing; raise while memory allows")
    offload: bool = option(False, "keep the blocks' inputs in host memory until the backward")
    fast: bool = option(True, "the fast twins of fast.py; false: model.py's plain definitions")
    deterministic: bool = option(False, "bitwise equal on every run, and slower")
    timeout: int = option(600, "seconds after which ranks stop waiting for each other")

    eval_data: str = heading("Evaluation, saving, output", "", "held-out corpus; empty: DATA-val")
    eval_every: int = option(0, "steps between evaluations; the last step always; 0: never")
    stop_after: int = option(0, "end after this many evaluations in a row without a better one")
    save_every: int = option(0, "steps between saved states; 0: only if the run is told to stop")
    keep: int = option(2, "undamaged saved states that stay")
    keep_best: bool = option(False, "also keep the state of the lowest held-out loss; it is model/")
    log_every: int = option(1, "steps between lines on the screen")
    sample: str = option("", "prompt to continue when the run has ended")
    wandb: bool = option(False, "send the metrics to Weights & Biases too")

    def __post_init__(self):
        super().__post_init__()
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                choices = f"choose one of {', '.join(allowed)}"
                raise ValueError(REMOVED.get(f"{name}={value}") or f"{name}={value!r}: {choices}")
        for f in dataclasses.fields(self):
            value, zero = getattr(self, f.name), f.name in MAY_BE_ZERO
            if f.type in (int, float) and not (0 < value < math.inf or (zero and value == 0)):
                wanted = "zero or positive" if zero else "positive"
                raise ValueError(f"{f.name}={short(value)} must be {wanted}, and finite")
            if f.type is int and value >= 2**31:
                raise ValueError(f"{f.name}={short(value)} must be less than 2147483648")
        if self.offload and (self.recompute == "none" or self.keep_blocks):
            raise ValueError(
                f"offload=True moves the blocks' inputs, but recompute={self.recompute}, "
                f"keep_blocks={self.keep_blocks} keep more than those: "
                "choose recompute=attention or all, and keep_blocks=0"
            )
        for name in ("frozen", "shard_frozen"):
            if not self.lora_rank and (value := getattr(self, name)) not in ("bf16", False):
                raise ValueError(f"{name}={value} is for adapters: set --lora_rank too")
        if self.lora_rank and not (self.checkpoint or self.dry_run or self.rehearse):
            raise ValueError(
                f"lora_rank={self.lora_rank}: adapters are kept apart from the weights that they "
                "adapt: name those, --checkpoint=..."
            )
        for name in ("keep_best", "stop_after"):
            if getattr(self, name) and not self.eval_every:
                value = getattr(self, name)
                raise ValueError(f"{name}={value} compares evaluations: set --eval_every too")
        if Path(self.name).name != self.name or self.name == "..":
            raise ValueError(
                f"name={self.name!r} must be a plain name: the run's files go to runs/NAME"
            )


CHOICES = {
    "optimizer": ("fp32", "split"),
    "recompute": ("none", "attention", "all"),
    "frozen": ("bf16", "mxfp4"),
}
MAY_BE_ZERO = {"epochs", "eval_every", "gpu_gib", "grad_clip", "keep_blocks", "save_every", "seed"}
MAY_BE_ZERO |= {"lora_rank", "stop_after", "warmup_steps", "weight_decay"}

REMOVED = {  # options of earlier versions, and what to do now
    "beta1": "beta1 is fixed at 0.9 now: leave it out",
    "beta2": "beta2 is fixed at 0.95 now: leave it out",
    "bad_steps": "bad_steps is fixed at 5 now: leave it out",
    "dtype": "dtype is bfloat16 on a GPU and float32 on a CPU now: leave it out",
    "eval_rows": "eval_rows is gone: an evaluation takes all held-out data, up to 2M tokens",
    "final_lr": "final_lr is fixed at 0.1 of lr now: leave it out",
    "long_documents": "long_documents is gone: what is longer than seq_len is cut, never dropped",
    "sample_tokens": "sample_tokens is fixed at 200 now; sample.py writes more",
    "optimizer=bf16": "optimizer=bf16 is gone, because it loses small updates: choose split",
}

SAME = {  # what other programs call our options, with values that mean the same here
    "block_size": "seq_len",
    "clip_grad": "grad_clip",
    "context_length": "seq_len",
    "context_parallel_size": "sp",
    "dataset": "data",
    "d_model": "hidden_size",
    "eval_interval": "eval_every",
    "eval_steps": "eval_every",
    "learning_rate": "lr",
    "log_interval": "log_every",
    "logging_steps": "log_every",
    "max_grad_norm": "grad_clip",
    "max_iters": "steps",
    "max_length": "seq_len",
    "max_seq_len": "seq_len",
    "max_steps": "steps",
    "max_train_steps": "steps",
    "micro_batch_size": "micro_batch",
    "model": "checkpoint",
    "model_name_or_path": "checkpoint",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "num_epochs": "epochs",
    "num_experts_per_tok": "experts_per_token",
    "num_iterations": "steps",
    "num_layers": "num_hidden_layers",
    "num_local_experts": "num_experts",
    "num_train_epochs": "epochs",
    "num_train_steps": "steps",
    "per_device_train_batch_size": "micro_batch",
    "save_steps": "save_every",
    "save_total_limit": "keep",
    "sequence_length": "seq_len",
    "train_data": "data",
    "val_data": "eval_data",
    "warmup_iters": "warmup_steps",
}

ACCUMULATION = (
    "how many micro-batches a step has follows from batch_size, its sequences over all ranks, and "
    "micro_batch, those that pass a rank's model at a time"
)
RECOMPUTING = "recompute is none, attention or all"
FOLDER = "a run's files go to runs/NAME: set name"
NONE = {  # what people look for and GPT-OSS, or this program, does not have, or not like that
    "accumulate_grad_batches": ACCUMULATION,
    "accumulation_steps": ACCUMULATION,
    "activation_checkpointing": RECOMPUTING,
    "dropout": "GPT-OSS has none",
    "eval_iters": "an evaluation takes all held-out data, up to 2M tokens",
    "grad_accum": ACCUMULATION,
    "grad_accum_steps": ACCUMULATION,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_checkpointing": RECOMPUTING,
    "out_dir": FOLDER,
    "output_dir": FOLDER,
    "compile": "what gains by it is compiled anyway; --fast=false turns it off",
}


# --------------------------------------------------------------------------------------------------
# Reading


def parse(arguments, usage, defaults=""):
    """Options from `defaults`, written as on the command line, from a config file and from the
    command line, in that order. ValueError names what is wrong and what was probably meant."""
    if "--help" in arguments or "-h" in arguments:
        print(help_text(usage))
        raise SystemExit
    files, typed = split_arguments(arguments)
    if len(files) > 1:
        listed = " ".join(files)
        raise ValueError(
            f"one config file, not {len(files)}: {listed}; write options as --name=value"
        )
    assigned = {}
    for path in files:
        if not Path(path).is_file():
            raise ValueError(f"config file {path} does not exist; this project's are in configs/")
        assigned = run_config(path)
    for name, value in {**assigned, **typed}.items():
        check_option(name, value)
    given = {}
    for each in split_arguments(defaults.split())[1], assigned, typed:  # wins over those before it
        for one, other in ("steps", "epochs"), ("epochs", "steps"):
            if one in each and other not in each:
                given.pop(other, None)
        given |= each
    if "steps" in given and given.get("epochs"):
        raise ValueError(f"steps={given['steps']} and epochs={given['epochs']}: give one of them")
    other_data = "data" in typed and typed["data"] != assigned.get("data")
    if other_data and "eval_data" in assigned and "eval_data" not in typed:
        forget_held_out(given, typed)
    given["name"] = given.get("name") or (Path(files[0]).stem if files else "run")
    return Options(**given)


def split_arguments(arguments):
    """The config files among the arguments, and {option: value} of the rest."""
    kinds = {f.name: f.type for f in dataclasses.fields(Options)}
    files, typed, rest = [], {}, list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word[2:].partition("=")
        if not word.startswith("-"):
            files.append(word)
            continue
        if not word.startswith("--") or not name:
            raise ValueError(f"{short(word, str)}: write --name=value")
        if name not in kinds:
            check_option(name, value)
        if not equals and kinds[name] is bool:
            switch = rest and rest[0].lower() in ("true", "false")
            value = rest.pop(0) if switch else "true"
        elif not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{name} needs a value: --{name}=...")
            value = rest.pop(0)
        typed[name] = read_value(name, value, kinds[name])
    return files, typed


def read_value(name, text, kind):
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        wanted = "true or false" if kind is bool else kind.__name__
        raise ValueError(f"--{name}={short(text, str)}: expected {wanted}") from None


def check_option(name, value):
    """ValueError unless there is an option `name` that takes `value`."""
    kinds = {f.name: f.type for f in dataclasses.fields(Options)}
    if name in kinds:
        kind = kinds[name]
        if type(value) is not kind and not (kind is float and type(value) is int):
            found = f"{name}={short(value)} must be of type {kind.__name__}"
            raise ValueError(f"{found}, not {type(value).__name__}")
        return
    if name in REMOVED:
        raise ValueError(REMOVED[name])
    key = name.replace("-", "_")
    near = difflib.get_close_matches(key, [*kinds, *SAME, *NONE], 1, cutoff=0.8)
    if near and near[0] in NONE:
        raise ValueError(f"there is no option {name}: {NONE[near[0]]}")
    meant = SAME.get(near[0], near[0]) if near else None
    if near and key in SAME:
        raise ValueError(f"there is no option {name}; here it is called {meant}")
    hint = f"; did you mean {meant}?" if meant else "; see --help"
    raise ValueError(f"there is no option {short(name, str)}{hint}")


def run_config(path):
    """What a config file assigns, without modules and names that begin with an underscore."""
    try:
        assigned = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # whatever the file does
        raise ValueError(f"config file {path}: {type(error).__name__}: {error}") from None
    return {
        k: v for k, v in assigned.items() if not k.startswith("_") and not isinstance(v, ModuleType)
    }


def forget_held_out(given, typed):
    """The held-out text of a config file does not judge a run on other data."""
    text, data = given.pop("eval_data"), given["data"]
    if own := own_held_out(data):
        say(f"held out: {own} instead of the config file's {text}, because of --data={data}")
    elif "eval_every" not in typed and given.pop("eval_every", 0):
        say(f"held out: nothing. The config file's {text} does not go with --data={data}")


def own_held_out(data):
    """The held-out corpus that belongs to `data`, or ""."""
    builtin = data == "pydoc"
    return f"{data}-val" if builtin or exists(Path(f"{data}-val") / "meta.json") else ""


def short(value, show=repr):
    text = show(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def help_text(usage):
    """Every option under its heading; the sizes of the model last."""
    lines, sizes = [usage, ""], {f.name for f in dataclasses.fields(GPTOSSConfig)}
    for f in dataclasses.fields(Options):
        if f.name not in sizes:
            if "heading" in f.metadata:
                lines += ["", f.metadata["heading"]]
            lines.append(f"  --{f.name}={f.default}".ljust(27) + f.metadata["meaning"])
    lines += ["", "Sizes of a model that starts from random weights (the defaults are the 20b's)"]
    listed = " ".join(f"--{f.name}={f.default}" for f in dataclasses.fields(GPTOSSConfig))
    lines += textwrap.wrap(listed, 96, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Sizes and ranks


def model_config(options):
    """The sizes of the model: the checkpoint's, or else those of the options. Sizes may be stated
    beside a checkpoint if they are its own: a dry run can then do without the checkpoint. Its
    positions can be set."""
    sizes = {f.name: getattr(options, f.name) for f in dataclasses.fields(GPTOSSConfig)}
    stated, defaults = GPTOSSConfig(**sizes), dataclasses.asdict(GPTOSSConfig())
    weights = 3 * stated.hidden_size * stated.intermediate_size * stated.num_experts
    parameters = stated.num_hidden_layers * weights + stated.vocab_size * stated.hidden_size
    if parameters > 1e14:
        raise ValueError(
            f"num_hidden_layers={stated.num_hidden_layers} and the other sizes make a model of "
            f"{parameters:.0e} parameters: choose smaller ones"
        )
    if not options.checkpoint:
        return stated
    if options.dry_run and not exists(options.checkpoint):
        say(
            f"{options.checkpoint} does not exist: planned for {stated.num_hidden_layers} layers "
            f"of {stated.num_experts} experts, as the options say"
        )
        return stated
    folder = Path(options.checkpoint)
    if exists(folder / "metrics.jsonl") or not exists(folder / "config.json"):
        folder = find_checkpoint(options)
    config = GPTOSSConfig.from_json(folder / "config.json")
    positions = sizes.pop("max_position_embeddings")
    if positions != defaults["max_position_embeddings"]:
        config.max_position_embeddings = positions  # may be more than the model was trained on
    for name, value in sizes.items():
        if value not in (defaults[name], getattr(config, name)):
            raise ValueError(
                f"{name}={value}, but checkpoint={options.checkpoint} has {getattr(config, name)}: "
                "leave the model's sizes to the checkpoint"
            )
    return config


def find_checkpoint(options):
    """The folder with the weights of `checkpoint`, which may be a run: then it is its model/."""
    try:
        return find_model(options.checkpoint).weights
    except ValueError as error:
        raise ValueError(f"{error} (with --checkpoint= the weights are random)") from None


def check_ranks(options, config, ranks):
    """ValueError if the options do not divide among the ranks."""
    sp, replicas = options.sp, options.replicas
    if ranks % (sp * replicas):
        raise ValueError(
            f"sp={sp} times replicas={replicas} must divide the number of ranks, {ranks}: start "
            "more with torchrun --nproc_per_node (dry run: --ranks), or choose a smaller --sp"
        )
    together = ranks // sp * options.micro_batch
    if options.batch_size % together:
        raise ValueError(
            f"batch_size={options.batch_size} must be a multiple of {together} = "
            f"{ranks} ranks / sp {sp} x micro_batch {options.micro_batch}"
        )
    if options.seq_len % sp:
        raise ValueError(f"sp={sp} must divide seq_len={options.seq_len}")
    if options.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"seq_len={options.seq_len} is longer than the model's "
            f"{config.max_position_embeddings} positions (max_position_embeddings)"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % sp or (kv_heads % sp and sp % kv_heads):
        raise ValueError(
            f"sp={sp} must divide num_attention_heads={heads}, and divide or be a multiple of "
            f"num_key_value_heads={kv_heads}"
        )
