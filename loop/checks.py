"""What must hold before a run may start. Every rank finds it out alone, before the ranks meet and
before a GPU has work."""

import dataclasses
import importlib.util
import math
import os
import stat
from pathlib import Path

import torch

import lora
from data import TokenData
from fast import say
from folders import exists
from loop.options import check_ranks, find_checkpoint, model_config, own_held_out
from loop.states import saved_states
from model import GPTOSS
from text.tokenizer import get_tokenizer
from weights import ADAPTERS, INDEX, open_weights


def check_run(options):
    """(options, with the steps that `epochs` stands for; the model's config; its data; held-out
    data or None) of a run that has what it needs. ValueError or OSError if it has not."""
    options, config = check_model(options)
    if options.wandb and not importlib.util.find_spec("wandb"):
        raise ValueError("wandb=True: install it with `pip install wandb`, or leave the option out")
    data, held_out = check_data(options, config)
    if options.epochs:
        steps = math.ceil(options.epochs * data.sequences_per_epoch / options.batch_size)
        options = dataclasses.replace(options, steps=steps)
    if options.sample:
        length = len(get_tokenizer(data.tokenizer).encode(options.sample))
        if not length < config.max_position_embeddings:
            raise ValueError(
                f"sample={options.sample[:20]!r}...: {length} tokens, and the model takes at most "
                f"{config.max_position_embeddings - 1}"
            )
    return options, config, data, held_out


def check_model(options):
    """(options, with the folder of the weights as its checkpoint; the model's config) of a run that
    has what it needs, its data apart. ValueError or OSError if it has not."""
    check_launch(options)
    config = model_config(options)
    check_ranks(options, config, int(os.environ.get("WORLD_SIZE", 1)))
    check_new(options)
    check_folder(options)
    if options.checkpoint:
        options = dataclasses.replace(options, checkpoint=str(find_checkpoint(options)))
        check_checkpoint(options, config)
    return options, config


def check_launch(options):
    """ValueError if the processes, or their GPUs, are not those of the options."""
    if "RANK" not in os.environ and (tasks := slurm_tasks()) > 1:
        raise ValueError(
            f"Slurm has {tasks} tasks, and without torchrun each would train by itself: srun "
            "--ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc_per_node="
            f"{torch.cuda.device_count() or 8} --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 "
            "train.py ... (examples/slurm.sh does)"
        )
    gpus, wanted = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if options.offload and not gpus:
        raise ValueError("offload=True needs a GPU: a CPU has no other memory than the host's")
    if 0 < gpus < wanted:
        raise ValueError(
            f"--nproc_per_node {wanted}: this machine has {gpus} GPUs, and each rank needs one"
        )


def slurm_tasks():
    """How many processes srun has started, this one included; 1 without Slurm."""
    names = "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"  # of this srun; of the job
    stated = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    number = os.environ.get("SLURM_PROCID", "")
    return max(int(stated[0]) if stated else 1, int(number) + 1 if number.isdigit() else 1)


def check_new(options):
    """ValueError if the run's folder holds a run, unless this one continues it and can."""
    run = Path("runs") / options.name
    ended = any(exists(run / "model" / name) for name in (INDEX, ADAPTERS))
    if ended and not saved_states(run / "states"):
        raise ValueError(
            f"{run} already holds a run, which has ended and kept no state to continue from: "
            "--name=... starts another"
        )
    if exists(run / "metrics.jsonl") and not options.resume:
        raise ValueError(
            f"{run} already holds a run: --resume continues it, --name=... starts another"
        )


def check_folder(options):
    """ValueError if the run's folder cannot be written, or its states/ cannot be one."""
    run = Path("runs") / options.name
    place = next(path for path in (run, *run.parents) if exists(path))
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(
            f"{run}: {place.absolute()} cannot be written: start in another folder, or choose "
            "another --name"
        )
    if exists(run / "states") and not stat.S_ISDIR(os.stat(run / "states").st_mode):
        raise ValueError(f"{run / 'states'} is not a folder: remove it, or choose another --name")


def check_checkpoint(options, config):
    """ValueError if the weights in options.checkpoint are not those of a model of this config, or
    cannot have the adapters that are asked for."""
    folder = options.checkpoint
    if exists(Path(folder) / ADAPTERS):
        raise ValueError(
            f"checkpoint={folder} holds adapters: `python convert_hf.py --export {folder} --out "
            "DIR` merges them, and DIR can be imported; or --resume the run that made them"
        )
    if options.lora_rank:
        return lora.check_run(options, config)
    with torch.device("meta"):
        wanted = dict(GPTOSS(config).named_parameters())
    open_weights(wanted, folder)


def check_data(options, config):
    """The data and the held-out data, or None, if both suit the model."""
    order = {"seed": options.seed, "vocab_size": config.vocab_size}
    data = TokenData(options.data, options.seq_len, **order)
    if data.sequences_per_epoch < options.batch_size:
        raise ValueError(
            f"data={options.data} fills {data.sequences_per_epoch} sequences of "
            f"seq_len={options.seq_len}, fewer than a step's batch_size={options.batch_size}: "
            "use more data, or make one of the two smaller"
        )
    if 2 * data.vocab_size < config.vocab_size:  # more than a padded or extended vocabulary
        raise ValueError(
            f"data={options.data} was encoded by {data.tokenizer} with a vocabulary of "
            f"{data.vocab_size}, but the model has {config.vocab_size} tokens: encode it with the "
            "tokenizer the model was trained with, or set vocab_size for a new one"
        )
    if not options.eval_every and not options.eval_data:
        if exists(Path(f"{options.data}-val") / "meta.json"):
            say(f"held out: {options.data}-val is there; --eval_every=... evaluates on it")
        return data, None
    held_out = options.eval_data or own_held_out(options.data)
    if not held_out:
        raise ValueError(
            f"eval_every={options.eval_every} has nothing to evaluate: there is no "
            f"{options.data}-val; name a corpus, --eval_data=..., or set it to 0"
        )
    held_out = TokenData(held_out, options.seq_len, **order)
    if held_out.tokenizer != data.tokenizer:
        raise ValueError(
            f"eval_data={held_out.path} was encoded by {held_out.tokenizer}, but "
            f"data={options.data} by {data.tokenizer}: encode both with one"
        )
    return data, held_out
