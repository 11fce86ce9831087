"""What is kept on disk: a model's configuration and weights, and a training run's state. JSON and safetensors, never pickle.

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
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

INDEX, SHARD_BYTES = "model.safetensors.index.json", 5 * 10**9
COMPANIONS = ("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json")  # travel with the weights
HF_CONFIG = "hf_config.json"  # the source's config.json, which an import keeps: an export needs fields that the model does not


def first_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


def hugging_face_fields(given, names, path):
    """What a Hugging Face gpt_oss config.json says of the fields `names`, which are OpenAI's. Before transformers 5 the rotary
    settings lay apart. ValueError for a model that model.py does not implement."""
    rope = given.get("rope_parameters") or {"rope_theta": given.get("rope_theta"), **(given.get("rope_scaling") or {})}
    layers, kinds = given.get("num_hidden_layers"), given.get("layer_types") or []
    implemented = {
        "model_type": (given["model_type"], "gpt_oss"),
        "layer_types": (kinds, ["full_attention" if i % 2 else "sliding_attention" for i in range(len(kinds))]),
        "number of layer_types": (len(kinds) or layers, layers),
        "tie_word_embeddings": (given.get("tie_word_embeddings", False), False),
        "attention_bias": (given.get("attention_bias", True), True),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type"), "yarn"),
        "truncate": (rope.get("truncate"), False),  # whether YaRN's ramp is rounded to whole dimensions
        "swiglu_alpha": (given.get("swiglu_alpha", 1.702), 1.702),
    }
    for name, (value, ours) in implemented.items():
        if value != ours:
            raise ValueError(f"{path}: {name} is {value!r}; model.py implements {ours!r} only")
    renamed = {
        "num_experts": given.get("num_local_experts"),
        "experts_per_token": given.get("num_experts_per_tok"),
        "initial_context_length": rope.get("original_max_position_embeddings"),
        "rope_theta": rope.get("rope_theta"),
        "rope_scaling_factor": rope.get("factor"),
        "rope_ntk_alpha": rope.get("beta_slow"),
        "rope_ntk_beta": rope.get("beta_fast"),
        "swiglu_limit": given.get("swiglu_limit", 7.0),  # transformers writes it since 4.56 and fixes it at 7
    }
    return {name: value for name in names if (value := renamed.get(name, given.get(name))) is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Weights


def weight_files(folder):
    """{parameter name: path of the safetensors file in `folder` that holds it}. ValueError for an index that is not one."""
    path = Path(folder) / INDEX
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(Path(file).name == file for file in weight_map.values()):
            raise ValueError("a file name in it leads out of the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable index of a checkpoint ({error}); convert_hf.py makes one") from None
    return {name: path.with_name(file) for name, file in weight_map.items()}


def stored_dtype(folder):
    """The dtype of the first tensor in `folder`."""
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


def open_weights(wanted, folder):
    """{name: safetensors slice} of a weights folder, for {name: parameter} of a model, of which only the shapes matter.

    ValueError that lists all that does not fit: missing, unknown and misshapen tensors, files that cannot be read."""
    files = weight_files(folder)
    if "model.embed_tokens.weight" in files:
        raise ValueError(f"{folder} is in Hugging Face's layout: `python convert_hf.py {folder}` makes a folder of ours")
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
            if slices[name].get_dtype() not in ("F64", "F32", "BF16", "F16"):
                problems.append(f"{name} has dtype {slices[name].get_dtype()}, which is no weight's")
        except Exception as error:
            problems.append(f"{files[name].name}: {error}")
    if problems:
        raise ValueError(f"{folder} does not fit the model:\n  " + "\n  ".join(sorted(problems)))
    return slices


@torch.no_grad()
def load_weights(model, folder):
    """Fill a materialised model from a weights folder, with open_weights's errors. A rank reads only what its shard holds."""
    wanted = dict(model.named_parameters())
    slices = open_weights(wanted, folder)
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
                try:
                    save_file(tensors, aside / file, metadata={"format": "pt"})
                    (aside / file).chmod(aside.stat().st_mode & 0o666)  # as others may read the folder; safetensors says 0600
                except SafetensorError as error:
                    raise OSError(f"cannot write {folder}: {error}") from None
        if writes:
            index = {"metadata": {"total_size": sum(size for _, size in parameters.values())}, "weight_map": weight_map}
            (aside / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            write_config(aside / "config.json")


def copy_companions(source, folder, patterns=COMPANIONS):
    """Copy what travels with weights from Hugging Face, the tokenizer for example, from one weights folder to another."""
    for path in {path for pattern in patterns for path in source.glob(pattern) if path.is_file()}:
        shutil.copyfile(path, folder / path.name)


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

    save() copies the tensors to host memory and returns; a thread writes them while training goes on. What goes wrong on one
    rank is an OSError on all."""

    def __init__(self, folder, keep):
        self.folder, self.keep, self.pending = Path(folder), keep, None
        # the thread's own, because its messages must not mix with the loop's; and patient, while the first rank reads checksums
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self.thread = ThreadPoolExecutor(1)
        if first_rank():
            for left in self.folder.glob(".step-*"):  # by a run that was killed while it saved
                shutil.rmtree(left)

    def complete(self):
        """The folders of complete states, the oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []

    def save(self, step, tensors, numbers):
        """Save {name: DTensor} and a dict of numbers for JSON as the state after `step` steps. Returns the seconds it stalled.
        OSError if this state's folder cannot be made, or the previous state could not be written."""
        self.wait()
        start, folder = time.perf_counter(), self.folder / f"step-{step:08d}"
        aside, failure = folder.with_name(f".{folder.name}.partial"), None
        if first_rank():
            try:
                aside.mkdir(parents=True)
            except OSError as error:
                failure = f"cannot save {folder}: {error}"
        self.agree(failure)  # and no rank writes before the folder is there
        writer = dcp.HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(self._publish, written, aside, folder, numbers)
        return time.perf_counter() - start

    def _publish(self, written, aside, folder, numbers):
        """Make the state visible once all ranks have written it. Returns what went wrong, or None."""
        try:
            written.result()
            if first_rank():
                files = sorted(aside.glob("*.safetensors"))
                with ThreadPoolExecutor() as pool:
                    numbers["files"] = dict(zip((file.name for file in files), pool.map(fingerprint, files)))
                (aside / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")
                publish(aside, folder)
                for old in self.complete()[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, dcp.CheckpointException) as error:
            if first_rank():
                shutil.rmtree(aside, ignore_errors=True)
            causes = {str(cause): rank for rank, (cause, _) in getattr(error, "failures", {}).items()}
            reason = "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items()) or error
            return f"cannot save {folder}: {reason}"

    def wait(self):
        """Wait until the state that is being written, if any, is complete. OSError if it could not be written."""
        if self.pending:
            failure, self.pending = self.pending.result(), None
            self.agree(failure)

    def agree(self, failure):
        """OSError on all ranks if on the first rank there is a failure."""
        told = [failure]
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[0]:
            raise OSError(told[0])

    def newest(self):
        """The numbers of the newest undamaged state, on every rank; None if there is no state. ValueError if all are damaged."""
        found = [self._newest() if first_rank() else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if isinstance(found[0], str):
            raise ValueError(found[0])
        return found[0]

    def _newest(self):
        damaged = []
        for folder in reversed(self.complete()):
            numbers, damage = examine(folder)
            if numbers:
                return numbers
            damaged.append(f"{folder.name} ({damage})")
            print(f"warning: the state {folder} is damaged ({damage}): trying the one before it", flush=True)
        return f"{self.folder}: all states are damaged, {', '.join(damaged)}: remove the folder to begin again" if damaged else None

    def load(self, step, tensors):
        """Fill {name: DTensor} from the state after `step` steps."""
        reader = dcp.HuggingFaceStorageReader(str(self.folder / f"step-{step:08d}"))
        dcp.load(tensors, storage_reader=reader, process_group=self.group)


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
        kinds = {key: type(numbers[key]) for key in ("step", "updates", "identity", "files")}
        if list(kinds.values()) != [int, int, dict, dict]:
            return None, "state.json is not what train.py writes"
        if folder.name != f"step-{numbers['step']:08d}":
            return None, f"state.json is of step {numbers['step']}"
        if sorted(numbers["files"]) != sorted(path.name for path in folder.glob("*.safetensors")):
            return None, "files are missing, or are too many"
        with ThreadPoolExecutor() as pool:
            found = dict(zip(numbers["files"], pool.map(lambda name: fingerprint(folder / name), numbers["files"])))
        if wrong := [name for name, expected in numbers["files"].items() if found[name] != expected]:
            return None, f"{', '.join(wrong)} has another size or checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, repr(error)
    return numbers, None
