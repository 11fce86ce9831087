"""A model's configuration and weights on disk. JSON and safetensors, never pickle.

A weights folder is config.json, model-0000i-of-0000n.safetensors of about 5 GB and model.safetensors.index.json, as on the
Hugging Face Hub.

Whatever is written is written aside and renamed when it is whole: a folder that is there is complete.
"""

import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

INDEX, SHARD_BYTES = "model.safetensors.index.json", 5 * 10**9
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
)  # travel with the weights
HF_CONFIG = "hf_config.json"  # the source's config.json, which an import keeps: an export needs fields that the model does not


def first_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Configuration


def read_config(path, kind):
    """The configuration, of the dataclass `kind`, that a config.json holds: ours, OpenAI's original or Hugging Face's.

    ValueError for a file that is none of these, and for a model that model.py does not implement."""
    try:
        given = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(given).__name__}")
    names = {field.name for field in fields(kind)}
    if "model_type" in given:
        given = hugging_face_fields(given, names, path)
    # OpenAI's original leaves the last two out
    missing = names - given.keys() - {"max_position_embeddings", "rms_norm_eps"}
    unknown = given.keys() - names
    if missing or unknown:
        raise ValueError(
            f"{path}: missing fields {sorted(missing)}, unknown fields {sorted(unknown)}"
        )
    try:
        return kind(**given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def hugging_face_fields(given, names, path):
    """What a Hugging Face gpt_oss config.json says of the fields `names`, which are OpenAI's. Before transformers 5 the rotary
    settings lay apart. ValueError for a model that model.py does not implement."""
    rope = given.get("rope_parameters") or {
        "rope_theta": given.get("rope_theta"),
        **(given.get("rope_scaling") or {}),
    }
    layers, kinds = given.get("num_hidden_layers"), given.get("layer_types") or []
    implemented = {
        "model_type": (given["model_type"], "gpt_oss"),
        "layer_types": (
            kinds,
            ["full_attention" if i % 2 else "sliding_attention" for i in range(len(kinds))],
        ),
        "number of layer_types": (len(kinds) or layers, layers),
        "tie_word_embeddings": (given.get("tie_word_embeddings", False), False),
        "attention_bias": (given.get("attention_bias", True), True),
        "hidden_act": (given.get("hidden_act", "silu"), "silu"),
        "rope_type": (rope.get("rope_type"), "yarn"),
        "truncate": (
            rope.get("truncate"),
            False,
        ),  # whether YaRN's ramp is rounded to whole dimensions
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
        "swiglu_limit": given.get(
            "swiglu_limit", 7.0
        ),  # transformers writes it since 4.56 and fixes it at 7
    }
    return {
        name: value for name in names if (value := renamed.get(name, given.get(name))) is not None
    }


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
        raise ValueError(
            f"{path}: not a readable index of a checkpoint ({error}); convert_hf.py makes one"
        ) from None
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
        raise ValueError(
            f"{folder} is in Hugging Face's layout: `python convert_hf.py {folder}` makes a folder of ours"
        )
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
                problems.append(
                    f"{name} has dtype {slices[name].get_dtype()}, which is no weight's"
                )
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
    bar = tqdm(
        wanted.items(), f"loading {folder}", unit=" tensors", disable=None if first_rank() else True
    )  # None: no terminal
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
    parameters = {
        name: (p, p.numel() * (dtype or p.dtype).itemsize) for name, p in model.named_parameters()
    }
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
                    (aside / file).chmod(
                        aside.stat().st_mode & 0o666
                    )  # as others may read the folder; safetensors says 0600
                except SafetensorError as error:
                    raise OSError(f"cannot write {folder}: {error}") from None
        if writes:
            index = {
                "metadata": {"total_size": sum(size for _, size in parameters.values())},
                "weight_map": weight_map,
            }
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
