"""A model's configuration and weights on disk: JSON and safetensors, never pickle.

A checkpoint folder is config.json, model-0000i-of-0000n.safetensors of about 5 GB each and
model.safetensors.index.json, as on the Hugging Face Hub. config.json is ours, OpenAI's original or
Hugging Face's; the first two have the fields of GPTOSSConfig, the third is mapped here, both ways.

Reference for the last: configuration_gpt_oss.py and modeling_rope_utils.py of
https://github.com/huggingface/transformers.
"""

import math
import os
import reprlib
import shutil
from contextlib import nullcontext
from dataclasses import asdict, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from folders import Aside, exists
from mxfp4 import unpacked
from shards import (
    INDEX,
    check_places,
    create_shards,
    entry_bytes,
    listed,
    read_header,
    read_json,
    read_places,
    weight_files,
)

READ_BYTES = 2**24  # read or written at a time; small enough for malloc to reuse the memory
ADAPTERS = "adapters.json"  # of a folder with adapters instead of weights: see lora.py
HF_CONFIG = "hf_config.json"  # Hugging Face's config.json, kept by an import for a later export
COMPANIONS = (  # files that travel with the weights
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "generation_config.json",
)


def first_rank():
    return not dist.is_initialized() or dist.get_rank() == 0


# --------------------------------------------------------------------------------------------------
# config.json: every key of transformers' GptOssConfig, versions 4 and 5, is in one of these tables

READ = {  # Hugging Face's key: (our field, the value that transformers gives an absent key)
    "num_hidden_layers": ("num_hidden_layers", 36),
    "num_local_experts": ("num_experts", 128),
    "num_experts_per_tok": ("experts_per_token", 4),
    "vocab_size": ("vocab_size", 201088),
    "hidden_size": ("hidden_size", 2880),
    "intermediate_size": ("intermediate_size", 2880),
    "head_dim": ("head_dim", 64),
    "num_attention_heads": ("num_attention_heads", 64),
    "num_key_value_heads": ("num_key_value_heads", 8),
    "sliding_window": ("sliding_window", 128),
    "swiglu_limit": ("swiglu_limit", 7.0),
    "max_position_embeddings": ("max_position_embeddings", 131072),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
}
READ_ROPE = {  # the same inside rope_parameters, which was called rope_scaling before version 5
    "factor": ("rope_scaling_factor", 32.0),
    "beta_fast": ("rope_ntk_beta", 32.0),
    "beta_slow": ("rope_ntk_alpha", 1.0),
    "original_max_position_embeddings": ("initial_context_length", 4096),
    "rope_theta": ("rope_theta", 150000.0),  # at the top level before version 5
}
RESTATED = {  # keys outside their usual place: they may only repeat the field
    "num_experts": "num_experts",
    "experts_per_token": "experts_per_token",
    "initial_context_length": "initial_context_length",
    "original_max_position_embeddings": "initial_context_length",
    "rope_theta": "rope_theta",
}
FIXED = {  # the only value that model.py implements, which is also transformers' default
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "swiglu_alpha": 1.702,
}
FIXED_ROPE = {"rope_type": "yarn", "truncate": False}  # truncate: round YaRN's ramp to whole pairs
ROPE_TEMPERATURE = ("attention_factor", "mscale", "mscale_all_dim")  # may only give YaRN's default
STRUCTURED = ("rope_parameters", "rope_scaling", "layer_types", "partial_rotary_factor")
HARMLESS = {  # what changes no logit and no gradient of ours
    "transformers_version", "architectures", "dtype", "torch_dtype", "initializer_range",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id",
    "decoder_start_token_id", "router_aux_loss_coef", "output_router_logits",
    "output_hidden_states", "output_attentions", "return_dict", "return_dict_in_generate",
    "torchscript", "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "pruned_heads",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "cross_attention_hidden_size",
    "tie_encoder_decoder", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "task_specific_params", "tokenizer_class", "prefix",
    "attn_implementation", "_attn_implementation", "_name_or_path",
    "quantization_config",  # convert_hf.py looks at the tensors, and at this
}  # fmt: skip


def read_config(path, kind):
    """The configuration, of the dataclass `kind`, in a config.json of ours, OpenAI's or Hugging
    Face's. ValueError for a file that is none of these, and for a model that is not GPT-OSS."""
    given = read_json(path)
    try:
        if "model_type" in given:
            given = from_hugging_face(given)
        names = {field.name for field in fields(kind)}
        # OpenAI's original leaves the last two out
        missing = names - given.keys() - {"max_position_embeddings", "rms_norm_eps"}
        unknown = sorted(given.keys() - names)
        problems = [f"missing: {name}" for name in sorted(missing)]
        problems += [f"unknown: {name}" for name in unknown]
        if problems:
            raise ValueError(f"these fields are wrong:{listed(problems)}")
        for name, value in given.items():
            positive(name, value)
        config = kind(**given)
        if exists(Path(path).with_name(INDEX)):
            check_layers(config, len(weight_files(Path(path).parent)))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def positive(name, value):
    """`value`, if it is a finite number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise ValueError(f"{name}={reprlib.repr(value)} must be a positive number")
    return value


def check_layers(config, tensors):
    """ValueError if so many layers cannot be in so few tensors: the model would fill the memory
    before anybody noticed."""
    if config.num_hidden_layers > tensors:
        raise ValueError(
            f"it speaks of {config.num_hidden_layers} layers, and there are {tensors} tensors"
        )


def from_hugging_face(given):
    """The fields of GPTOSSConfig that a Hugging Face config.json means to transformers 5.
    ValueError for what model.py does not compute, and where two keys contradict each other."""

    def require(name, value, *allowed):
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise ValueError(
                f"{name} is {reprlib.repr(value)}; model.py implements {allowed[0]!r} only"
            )

    for name, ours in FIXED.items():
        require(name, given.get(name, ours), ours)
    config = {ours: given.get(name, default) for name, (ours, default) in READ.items()}
    if "num_local_experts" not in given:
        config["num_experts"] = given.get("num_experts", config["num_experts"])
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config["head_dim"] is None:
        config["head_dim"] = positive("hidden_size", config["hidden_size"]) // positive(
            "num_attention_heads", config["num_attention_heads"]
        )
    config |= rope_from_hugging_face(given, config["max_position_embeddings"], require)

    layers, kinds = config["num_hidden_layers"], given.get("layer_types")
    if kinds is not None:
        require("layer_types", kinds, layer_types(len(kinds)) if isinstance(kinds, list) else None)
        require("number of layer_types", len(kinds), layers)
    if given.get("partial_rotary_factor") is not None:
        require("partial_rotary_factor", given["partial_rotary_factor"], 1.0)
    for name, ours in RESTATED.items():
        if given.get(name, config[ours]) != config[ours]:
            raise ValueError(
                f"{name} is {reprlib.repr(given[name])}, but elsewhere {config[ours]!r}: which one?"
            )
    return config


def layer_types(layers):
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


def rope_from_hugging_face(given, context, require):
    """The rotary fields. `context`: max_position_embeddings."""
    names = ("rope_scaling", "rope_parameters")
    found = [given[name] for name in names if given.get(name) is not None]
    if not found:
        # a rope_scaling of null is no YaRN to transformers 4, and the default to 5
        require("rope_scaling", given.get("rope_scaling", "yarn"), "yarn")
        default = {name: default for name, (_, default) in READ_ROPE.items()}
        default["rope_theta"] = given.get("rope_theta", default["rope_theta"])
        found = [FIXED_ROPE | default]
    rope = found[0]
    if not isinstance(rope, dict) or rope != found[-1]:
        raise ValueError("rope_parameters and rope_scaling: expected one JSON object")
    allowed = {*READ_ROPE, *FIXED_ROPE, *ROPE_TEMPERATURE, "type", "partial_rotary_factor"}
    if unknown := sorted(rope.keys() - allowed):
        raise ValueError(f"model.py implements no rotary settings {reprlib.repr(unknown)}")
    for name, ours in FIXED_ROPE.items():
        second = rope.get("type") if name == "rope_type" else None
        require(name, rope.get(name, second), ours)
    require("type", rope.get("type", "yarn"), "yarn")
    require("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 1.0)

    initial = positive(
        "original_max_position_embeddings",
        rope.get("original_max_position_embeddings", context),
    )
    factor = rope.get("factor")
    factor = positive("max_position_embeddings", context) / initial if factor is None else factor
    default = 0.1 * math.log(positive("factor", factor)) + 1
    temperature = rope.get("attention_factor")
    if temperature is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        over, under = (
            0.1 * positive(name, rope[name]) * math.log(factor) + 1
            for name in ("mscale", "mscale_all_dim")
        )
        temperature = over / under
    if factor < 1 or not math.isclose(
        default if temperature is None else positive("attention_factor", temperature),
        default,
        rel_tol=1e-6,
    ):
        raise ValueError(
            f"the attention factor is {reprlib.repr(temperature)} and factor {factor}; model.py "
            f"implements a factor of at least 1 and 0.1 ln(factor) + 1 only"
        )
    return {
        "rope_theta": rope.get("rope_theta", given.get("rope_theta", 150000.0)),
        "rope_scaling_factor": factor,
        "rope_ntk_alpha": rope.get("beta_slow") or 1.0,
        "rope_ntk_beta": rope.get("beta_fast") or 32.0,
        "initial_context_length": initial,
    }


def unread_keys(given):
    """The keys of a Hugging Face config.json that nothing here knows."""
    known = READ.keys() | RESTATED.keys() | FIXED.keys() | {*STRUCTURED} | HARMLESS
    return sorted(given.keys() - known)


def hf_config(config, dtype, mxfp4, source):
    """Hugging Face's config.json for a GPTOSSConfig. `source`: the one that came with the weights,
    whose other keys are kept, or {}.

    Rotary settings are written as in the released models, which every version reads."""
    ours = asdict(config)
    tokens = {"eos_token_id": 200_002, "pad_token_id": 199_999}  # of the released vocabulary
    given = tokens if ours["vocab_size"] == READ["vocab_size"][1] else {}
    stale = ("quantization_config", "rope_parameters", "dtype", "num_experts")
    given = given | {name: value for name, value in source.items() if name not in stale}
    given |= {name: ours[field] for name, (field, _) in READ.items()} | FIXED
    for name in ("experts_per_token", "initial_context_length", "rope_theta"):
        given[name] = ours[name]
    given |= {
        "architectures": ["GptOssForCausalLM"],
        "torch_dtype": str(dtype).removeprefix("torch."),
        "layer_types": layer_types(config.num_hidden_layers),
        "rope_scaling": FIXED_ROPE
        | {name: ours[field] for name, (field, _) in READ_ROPE.items() if name != "rope_theta"},
    }
    if mxfp4:
        kept = ("model.layers.*.self_attn", "model.layers.*.mlp.router")
        kept += ("model.embed_tokens", "lm_head")
        given["quantization_config"] = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": list(kept),
        }
    return given


# --------------------------------------------------------------------------------------------------
# Folders: whose they are, and a model's way in and out


class Found(NamedTuple):
    """What find_model found in a folder."""

    layout: str  # "ours", "adapters" on one of ours, "hugging_face" or "openai"
    weights: Path  # the folder with config.json and the tensors
    run: Path | None  # the training run that it belongs to
    tokenizer: str | None  # the name of the tokenizer, as the run recorded it


def find_model(folder):
    """What lies in `folder`: a checkpoint of ours, Hugging Face's or OpenAI's, a training run
    (runs/NAME) or a run's model/. ValueError if it is none of these, or a run without a model yet;
    OSError if it cannot be examined."""
    folder = Path(folder)
    if not exists(folder) or not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder. convert_hf.py makes checkpoints/NAME, train.py makes "
            "runs/NAME"
        )
    run, tokenizer = None, None
    for candidate in [folder, folder.parent] if folder.name == "model" else [folder]:
        recorded = {}
        if exists(candidate / "config.json"):
            try:
                recorded = read_json(candidate / "config.json")
            except ValueError:
                recorded = {}  # whoever reads the configuration will say so
        signs = [candidate / "model" / name for name in (INDEX, ADAPTERS)]
        signs.append(candidate / "metrics.jsonl")
        if "tokenizer" in recorded or any(map(exists, signs)):
            run, tokenizer = candidate, recorded.get("tokenizer")
            break
    weights = run / "model" if run else folder
    if not exists(weights):
        raise ValueError(
            f"{run}: this run has no model/ yet. train.py with --resume=true finishes it"
        )
    if not exists(weights / "config.json"):
        raise ValueError(
            f"{weights / 'config.json'} does not exist; convert_hf.py makes checkpoints/NAME, and "
            "a run's weights are in runs/NAME/model"
        )
    if exists(weights / ADAPTERS):
        return Found("adapters", weights, run, tokenizer)
    index = exists(weights / INDEX)
    names = (weight_files(weights) if index else read_places(weights)[0]).keys()
    if not (layout := layout_of(names)):
        raise ValueError(
            f"{weights}: these tensors have neither our names nor Hugging Face's nor OpenAI's, "
            f"but {reprlib.repr(min(names, default='none'))}; convert_hf.py makes a checkpoint"
        )
    if layout == "ours" and not index:
        raise ValueError(
            f"{weights / INDEX} does not exist: copy it too, or run convert_hf.py again"
        )
    return Found(layout, weights, run, tokenizer)


def layout_of(names):
    """Whose these names of tensors are: "ours", "hugging_face", "openai" or None."""
    prefixes = {"blocks.": "ours", "model.layers.": "hugging_face", "block.": "openai"}
    for prefix, layout in prefixes.items():
        if any(name.startswith(prefix) for name in names):
            return layout
    return None


def stored_dtype(folder):
    """The dtype of the first tensor in `folder`."""
    name, path = next(iter(weight_files(folder).items()), (None, None))
    try:
        return read_header(path)[name].dtype
    except Exception as error:  # see read_places
        raise ValueError(f"{folder}: cannot read {name} from {path}: {error}") from None


def free_memory(device):
    """Bytes that a model may take on `device`: what its caches hold counts as free. Of a host that
    is not Linux, which does not say, half of what it has."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def copy_rows(parameter, whole):
    """Fill `parameter` from `whole`, a tensor or a Place of the same shape, a few megabytes at a
    time. Of a DTensor only the local shard is read: FSDP cuts the first dimension as torch.chunk
    does."""
    start, local = 0, parameter
    if isinstance(parameter, DTensor):
        dim = next(i for i, placement in enumerate(parameter.placements) if placement.is_shard(0))
        chunk = math.ceil(parameter.shape[0] / parameter.device_mesh.size(dim))
        start = min(chunk * parameter.device_mesh.get_local_rank(dim), parameter.shape[0])
        local = parameter.to_local()
    step = slice_length(local)
    for i in range(0, len(local), step):
        part = local[i : i + step]
        part.copy_(whole[start + i : start + i + len(part)])


def slice_length(tensor):
    """How many entries of the first dimension make READ_BYTES, at least one."""
    return max(1, READ_BYTES // max(1, entry_bytes(tensor)))


def open_weights(wanted, folder):
    """{name: Place} of a checkpoint folder, for the {name: parameter} of a model, of which only the
    shapes matter. ValueError that lists what does not fit."""
    files = weight_files(folder)
    if "model.embed_tokens.weight" in files:
        raise ValueError(
            f"{folder} is in Hugging Face's layout: `python convert_hf.py {folder}` converts it"
        )
    places, problems = read_places(folder)
    if not any(name.endswith("_blocks") for name in wanted):
        places = unpacked(places)  # a packed folder gives a model whole matrices, too
    check_places(folder, places, problems, {name: tuple(p.shape) for name, p in wanted.items()})
    return places


@torch.no_grad()
def fill(parameters, places, folder):
    """Fill {name: parameter} from {name: Place} in `folder`. Each rank reads only what its shard
    holds."""
    disable = None if first_rank() else True  # None: shown on a terminal only
    for name, parameter in tqdm(parameters.items(), f"loading {folder}", disable=disable):
        copy_rows(parameter, places[name])


def load_weights(model, folder):
    """Fill a model from a checkpoint folder, with open_weights's errors, and OSError for what
    cannot be read."""
    wanted = dict(model.named_parameters())
    fill(wanted, open_weights(wanted, folder), folder)


@torch.no_grad()
def save_weights(model, folder, dtype, write_config):
    """Write a model's parameters, as `dtype` if given, to a checkpoint folder, which may replace
    an older one. `write_config(path)` writes its config.json. The ranks of a sharded model call
    this together; the first one writes, with one tensor at a time in memory.

    ValueError if `folder` holds anything but a checkpoint."""
    folder = Path(folder)
    if exists(folder) and os.listdir(folder) and not exists(folder / INDEX):
        raise ValueError(f"{folder} holds something other than a checkpoint: name another folder")
    parameters = dict(model.named_parameters())
    writes = first_rank() or not any(isinstance(p, DTensor) for p in parameters.values())
    with Aside(folder, replace=True) if writes else nullcontext() as aside:
        if writes:
            places = create_shards(
                aside, {name: (dtype or p.dtype, tuple(p.shape)) for name, p in parameters.items()}
            )
        for name, parameter in parameters.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if writes:
                step = slice_length(whole)
                for i in range(0, len(whole), step):
                    places[name].write(i, whole[i : i + step])
        if writes:
            write_config(aside / "config.json")


def copy_companions(source, folder, patterns=COMPANIONS):
    """Copy the files that travel with weights, the tokenizer's for example, from one folder to
    another. A link that leads out of its folder is left out, unless into the Hub's own cache,
    which keeps a folder's files elsewhere."""
    source = Path(source)
    inside = [source.resolve()]
    if source.resolve().parent.name == "snapshots":
        inside.append(source.resolve().parents[1] / "blobs")
    for name in sorted(os.listdir(source)):
        path = source / name
        if not any(fnmatch(name, pattern) for pattern in patterns) or not path.is_file():
            continue
        if path.resolve().parent in inside:
            shutil.copyfile(path, folder / name)
        else:
            print(f"{path} is not copied: it is a link to {path.resolve()}, outside its folder")
