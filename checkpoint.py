"""What is kept on disk: a model's weights, and a training run's whole state. Both are safetensors, never pickle.

A weights folder is config.json, model-0000i-of-0000n.safetensors of about 5 GB and model.safetensors.index.json, as on the
Hugging Face Hub. A run's state is what its ranks hold, one file a rank, written by torch.distributed.checkpoint, which hands
it back to any number of ranks; state.json beside the files has the plain numbers and every file's size and checksum.

Whatever is written is written aside and renamed when it is whole: a folder that is there is complete.
"""

import json
import math
import os
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

INDEX, SHARD_BYTES = "model.safetensors.index.json", 5 * 10**9


def first_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder):
    """{parameter name: path of the safetensors file in `folder` that holds it}. ValueError for an index that is not one."""
    path = Path(folder) / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(Path(file).name == file for file in weight_map.values()):
            raise ValueError("a file name in it leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a readable index of a checkpoint ({error}); convert_hf.py makes one") from None
    return {name: path.with_name(file) for name, file in weight_map.items()}


def stored_dtype(folder):
    """The dtype of the weights in `folder`, of which all have one."""
    name, path = next(iter(weight_files(folder).items()), (None, None))
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice(name)[:0].dtype
    except Exception as error:  # safetensors has its own exception for each way a file can be wrong
        raise ValueError(f"{folder}: cannot read {name} from {path}: {error}") from None


def copy_rows(parameter, whole):
    """Fill `parameter` from `whole`, a tensor or a safetensors slice of the same shape; a DTensor with the rows of its local
    shard, and only they are read. FSDP cuts the first dimension as torch.chunk does."""
    start, local = 0, parameter
    if isinstance(parameter, DTensor):
        dim = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard(0))
        chunk = math.ceil(parameter.shape[0] / parameter.device_mesh.size(dim))
        start = min(chunk * parameter.device_mesh.get_local_rank(dim), parameter.shape[0])
        local = parameter.to_local()
    if len(local):
        local.copy_(whole[start : start + len(local)])


@torch.no_grad()
def load_weights(model, folder):
    """Fill a materialised model from a weights folder. A rank reads only what its shard of the model holds.

    ValueError that lists all that does not fit: missing, unknown and misshapen tensors, files that cannot be read."""
    wanted, files = dict(model.named_parameters()), weight_files(folder)
    problems = [f"missing: {name}" for name in wanted.keys() - files.keys()]
    problems += [f"unknown: {name}" for name in files.keys() - wanted.keys()]
    opened, slices = {}, {}
    for path in sorted(set(files.values())):
        try:
            opened[path] = safe_open(path, "pt")
        except Exception as error:
            problems.append(f"{path.name} is unreadable: {error}")
    for name in sorted(wanted.keys() & {name for name in files if files[name] in opened}):
        try:
            slices[name] = opened[files[name]].get_slice(name)
            shape, expected = tuple(slices[name].get_shape()), tuple(wanted[name].shape)
            if shape != expected:
                problems.append(f"{name} has shape {shape}, the model's is {expected}")
        except Exception as error:
            problems.append(f"{files[name].name}: {error}")
    if problems:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    bar = tqdm(wanted.items(), f"loading {folder}", unit=" tensors", disable=None if first_rank() else True)  # None: no terminal
    for name, parameter in bar:
        copy_rows(parameter, slices[name])


@torch.no_grad()
def save_weights(model, folder, dtype, write_config):
    """Write a model's parameters, as `dtype` if given, to a weights folder, whole or not at all. It may replace an older one.
    The ranks of a sharded model call this together; the first one writes, with a few GB at a time in host memory.

    ValueError if `folder` holds anything but a checkpoint."""
    folder = Path(folder)
    if folder.exists() and os.listdir(folder) and not (folder / INDEX).exists():
        raise ValueError(f"{folder} holds something other than a checkpoint: name another folder")
    parameters = {name: (p, p.numel() * (dtype or p.dtype).itemsize) for name, p in model.named_parameters()}
    writes = first_rank() or not any(isinstance(p, DTensor) for p, _ in parameters.values())
    shards, size = [[]], 0
    for name, (_, nbytes) in parameters.items():
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    with Aside(folder, writes) as aside:
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file, tensors = f"model-{number:05d}-of-{len(shards):05d}.safetensors", {}
            for name in names:
                parameter, _ = parameters[name]
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                if writes:
                    tensors[name] = whole.detach().to("cpu", dtype or whole.dtype).contiguous()
                    weight_map[name] = file
            if writes:
                save_file(tensors, aside / file, metadata={"format": "pt"})
        if writes:
            index = {"metadata": {"total_size": sum(size for _, size in parameters.values())}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            write_config(aside / "config.json")


class Aside:
    """`with Aside(folder) as aside:` write to `aside`, which becomes `folder` when the block ends well and vanishes if not."""

    def __init__(self, folder, writes=True):
        self.folder, self.writes = Path(folder), writes
        self.aside = self.folder.with_name(f".{self.folder.name}.partial")

    def __enter__(self):
        if self.writes:
            shutil.rmtree(self.aside, ignore_errors=True)
            self.aside.mkdir(parents=True)
        return self.aside

    def __exit__(self, kind, *_):
        if self.writes and kind is None:
            publish(self.aside, self.folder)
        elif self.writes:
            shutil.rmtree(self.aside, ignore_errors=True)


def publish(aside, folder):
    """Give the finished folder its name; an older one of that name goes."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ----------------------------------------------------------------------------------------------------------------------
# A training run's state


class States:
    """The saved states of a run: folders `step-00000100` in `folder`, of which the last `keep` stay.

    save() copies the tensors to host memory and returns; a thread writes them while training goes on."""

    def __init__(self, folder, keep):
        self.folder, self.keep, self.pending = Path(folder), keep, None
        self.group = dist.new_group(backend="gloo")  # the thread's own: its messages must not mix with the loop's
        self.thread = ThreadPoolExecutor(1)

    def complete(self):
        """The folders of complete states, the oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []

    def save(self, step, tensors, numbers):
        """Save {name: DTensor} and a dict of numbers for JSON as the state after `step` steps. Returns the seconds it stalled.
        OSError if the previous state could not be written."""
        self.wait()
        start, folder = time.perf_counter(), self.folder / f"step-{step:08d}"
        aside = folder.with_name(f".{folder.name}.partial")
        if first_rank():
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier(self.group)  # no rank writes before the folder is there
        writer = dcp.HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(self._publish, written, aside, folder, numbers)
        return time.perf_counter() - start

    def _publish(self, written, aside, folder, numbers):
        written.result()  # every rank's files are written
        if not first_rank():
            return
        files = sorted(aside.glob("*.safetensors"))
        with ThreadPoolExecutor() as pool:
            numbers["files"] = dict(zip((file.name for file in files), pool.map(fingerprint, files)))
        (aside / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")
        publish(aside, folder)
        for old in self.complete()[: -self.keep]:
            shutil.rmtree(old)

    def wait(self):
        """Wait until the state that is being written, if any, is complete. OSError if it could not be written."""
        if self.pending:
            self.pending.result()
            self.pending = None

    def restore(self, tensors):
        """Fill {name: DTensor} from the newest undamaged state. Returns its numbers, or None if there is no state."""
        for folder in reversed(self.complete()):
            found = [examine(folder) if first_rank() else None]
            dist.broadcast_object_list(found, src=0, group=self.group)
            numbers, damage = found[0]
            if damage is None:
                dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), process_group=self.group)
                return numbers
            if first_rank():
                print(f"warning: {folder} is damaged ({damage}); trying the state before it", flush=True)
        return None


def fingerprint(path):
    """[size in bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def examine(folder):
    """(the numbers of a saved state, what is damaged in it or None)"""
    try:
        numbers = json.loads((folder / "state.json").read_text())
        for name, expected in numbers["files"].items():
            if fingerprint(folder / Path(name).name) != expected:
                return None, f"{name} has another size or checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, str(error)
    return numbers, None
