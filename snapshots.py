"""A saved state of a training run as a model: what a run has learned so far.

A state is a folder runs/NAME/states/step-00000100, written by loop/states.py with
torch.distributed.checkpoint. It holds each trained parameter, and the optimizer's state beside it.
"""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp

import lora
from folders import exists
from model import GPTOSS, GPTOSSConfig
from shards import read_json, read_places
from weights import ADAPTERS, find_model

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


def run_of(folder):
    """The run that a state belongs to."""
    return Path(os.path.abspath(folder)).parent.parent


def state_config(folder):
    """The configuration of the model in a state. ValueError if its numbers are not train.py's."""
    path = Path(folder) / NUMBERS
    try:
        sizes = read_json(path)["identity"]
        return GPTOSSConfig(**{field.name: sizes[field.name] for field in fields(GPTOSSConfig)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not what train.py writes: {error}") from None


def adapter_settings(folder):
    """What adapters.json will say of the run of a state, as lora.read_settings returns it; None for
    a run without adapters. ValueError if their base is not there, or is another one."""
    run = run_of(folder)
    if exists(run / "model" / ADAPTERS):
        return lora.read_settings(run / "model")
    was = read_json(Path(folder) / NUMBERS).get("identity", {})
    if "lora_rank" not in was:
        return None
    path = run / "config.json"
    settings = {name: was.get(f"lora_{name}") for name in lora.SETTINGS}
    settings |= {"base": read_json(path).get("checkpoint", ""), "identity": was.get("identity")}
    lora.check_base(path, settings)
    return settings


# --------------------------------------------------------------------------------------------------
# What a state holds


def stored_tensors(folder):
    """{name: its metadata} of all tensors in a state."""
    return dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def reader_of(folder):
    """What read_tensors reads a state with. It looks at the headers of all files once, not for each
    tensor: the 20b's on eight ranks has some seven hundred."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    reader.read_metadata = functools.cache(reader.read_metadata)
    return reader


def read_tensors(reader, tensors):
    """Fill {name: tensor} from a state."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)


@dataclass(frozen=True)
class Stored:
    """A parameter in a state, as shards.Place shows one that a file holds: the ranks' parts are
    joined. A slice reads the whole parameter, and the last two stay in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable  # (name, dtype, shape) -> the whole parameter

    def __getitem__(self, entries):
        return self.read(self.name, self.dtype, self.shape)[entries]


def check_complete(folder, wanted, stored):
    """ValueError if a state, which has the tensors `stored`, lacks one of the parameters
    `wanted`."""
    if missing := [name for name in wanted if name not in stored]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"{folder} lacks {missing[0]}{more}: it is damaged, or they were frozen, for a state "
            f"holds what is trained; then {run_of(folder) / 'model'} has them once it has ended"
        )


def state_places(folder):
    """({our name: Stored, or as lora.places}, problems) of the model in a state, as convert_hf.py
    exports it. ValueError as in `adapter_settings`, or if the state lacks a parameter."""
    folder, reader, lock = Path(folder), reader_of(folder), threading.Lock()

    @functools.lru_cache(maxsize=2)
    def whole(name, dtype, shape):
        tensor = torch.empty(shape, dtype=dtype)
        read_tensors(reader, {name: tensor})
        return tensor

    def read(*what):
        with lock:  # several threads ask for slices of one parameter
            return whole(*what)

    settings, stored = adapter_settings(folder), stored_tensors(folder)
    with torch.device("meta"):
        model = GPTOSS(state_config(folder))
    if settings:
        wanted = lora.adapters(lora.adapt_with(model, settings))
    else:
        wanted = dict(model.named_parameters())
    check_complete(folder, wanted, stored)
    places = {
        name: Stored(name, stored[name].properties.dtype, tuple(stored[name].size), read)
        for name in wanted
    }
    return lora.merged(folder, settings, places) if settings else (places, [])


def state_dtype(folder):
    """The dtype in which a state holds its parameters; bf16 if it has not the first."""
    first = stored_tensors(folder).get("embedding.weight")
    return first.properties.dtype if first else torch.bfloat16


def load_state(folder, device="cpu", dtype=None):
    """The model in a state, in `dtype` or as it is stored; `device` never holds it in another. What
    adapters leave as it was comes from their base. ValueError if the state lacks a parameter."""
    folder = Path(folder)
    stored, settings = stored_tensors(folder), adapter_settings(folder)
    if settings:
        model = lora.from_base(Path(settings["base"]), settings, device, dtype)
        wanted = lora.adapters(model)
    else:
        with torch.device("meta"):
            model = GPTOSS(state_config(folder)).to(dtype or state_dtype(folder))
        wanted = dict(model.named_parameters())
    check_complete(folder, wanted, stored)
    if not settings:
        model = model.to_empty(device=device)
        wanted = dict(model.named_parameters())
    read_tensors(reader_of(folder), {name: p.detach() for name, p in wanted.items()})
    return model


# --------------------------------------------------------------------------------------------------
# What convert_hf.py exports


class Exported(NamedTuple):
    """What an export reads."""

    folder: Path  # of the weights or of the state
    config: GPTOSSConfig
    places: dict
    problems: list
    packed: bool  # the experts lie there in MXFP4, and stay
    homes: list[Path]  # folders that may hold the files that travel with the weights
    tokenizer: str | None  # its name, if a run recorded it


def find_exported(run, state=None, mxfp4=False):
    """The Exported of a checkpoint folder, a training run, or a saved state: its own folder, or a
    run and `state`, see find_state. ValueError if there is none."""
    if snapshot := find_state(run, state):
        home = run_of(snapshot)
        known = read_json(home / "config.json") if exists(home / "config.json") else {}
        places, problems = state_places(snapshot)
        homes = [home / "model", Path(known.get("checkpoint") or home)]
        found = snapshot, state_config(snapshot), places, problems, False, homes
        return Exported(*found, known.get("tokenizer"))
    found = find_model(run)
    if found.layout not in ("ours", "adapters"):
        raise ValueError(f"{found.weights} is no checkpoint of ours: import it first")
    config = GPTOSSConfig.from_json(found.weights / "config.json")
    packed = mxfp4 and found.layout == "ours" and lora.is_packed(found.weights)
    places, problems = read_places(found.weights) if packed else lora.places(found.weights)
    return Exported(
        found.weights, config, places, problems, packed, [found.weights], found.tokenizer
    )
