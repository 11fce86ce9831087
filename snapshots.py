"""A saved state of a training run as a model: what a run has learned so far.

A state is a folder runs/NAME/states/step-00000100, written by loop/states.py with
torch.distributed.checkpoint. It holds each trained parameter, and the optimizer's state beside it.
"""

import warnings
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from folders import exists
from lora import from_checkpoint
from model import GPTOSS, GPTOSSConfig
from weights import ADAPTERS, read_json

NUMBERS = "state.json"  # the file that tells a state from other folders


def find_state(folder, which=None):
    """The state that is meant: `folder` itself, or of the run `folder` the state `which`: "best",
    by held-out loss, "last", or a number of steps. None if `which` is None and `folder` is no
    state. ValueError for a state that is not there."""
    folder = Path(folder)
    if which is None:
        return folder if exists(folder / NUMBERS) else None
    found = [path.parent for path in folder.glob(f"states/step-*/{NUMBERS}")]
    found = {path: path.name.removeprefix("step-") for path in found}
    found = {path: int(step) for path, step in found.items() if step.isdecimal()}
    states = sorted(found, key=found.get)
    steps = [found[path] for path in states]
    if which == "best":
        losses = {path: read_json(path / NUMBERS).get("held_out") for path in states}
        losses = {path: loss for path, loss in losses.items() if isinstance(loss, float)}
        if states and not losses:
            raise ValueError(
                f"{folder}: no state has a held-out loss: eval_every makes evaluations, and "
                "keep_best keeps the best state"
            )
        states = [min(losses, key=losses.get)] if losses else []
    elif which != "last":
        if not str(which).isdecimal():
            raise ValueError(f"state={which}: best, last, or a number of steps")
        states = [path for path, step in zip(states, steps) if step == int(which)]
    if not states:
        there = ", ".join(map(str, steps)) or "none"
        raise ValueError(f"{folder} has no state {which}: states after steps: {there}")
    return states[-1]


def state_config(folder):
    """The configuration of the model in a state. ValueError if its numbers are not train.py's."""
    path = Path(folder) / NUMBERS
    try:
        sizes = read_json(path)["identity"]
        return GPTOSSConfig(**{field.name: sizes[field.name] for field in fields(GPTOSSConfig)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what train.py writes: {error}") from None


def load_state(folder, device="cpu", dtype=None):
    """The model in a state, in `dtype` or as it is stored. What was not trained, under adapters,
    comes from the run's model/. ValueError if the state lacks a parameter."""
    folder = Path(folder)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    finished = folder.parent.parent / "model"
    if exists(finished / ADAPTERS):
        model, partial = from_checkpoint(finished, device), True
    else:
        with torch.device("meta"):
            model, partial = GPTOSS(state_config(folder)), False
        first = next(iter(dict(model.named_parameters())))
        model = model.to(stored[first].properties.dtype if first in stored else torch.bfloat16)
    wanted = dict(model.named_parameters())
    missing = [] if partial else sorted(wanted.keys() - stored.keys())
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} and {len(missing) - 1} others")
    if not partial:
        model = model.to_empty(device=device)
        wanted = dict(model.named_parameters())
    parameters = {name: p.detach() for name, p in wanted.items() if name in stored}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(parameters, storage_reader=reader, no_dist=True)
    return model.to(dtype) if dtype else model
