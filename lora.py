"""Low-rank adapters on frozen weights, attached to the model from outside.

A frozen layer x W + bias becomes x W + bias + (alpha / r) (x A) B with A (in, r), B (r, out) and a
small rank r; only A and B are trained. B starts at zero, so an adapted model starts as its base
(LoRA: Hu et al., https://arxiv.org/abs/2106.09685).

    model = GPTOSS.from_checkpoint("checkpoints/gpt-oss-20b", "cuda", recompute="all")
    adapt(model, rank=16, targets="attention")

The experts are nine tenths of the weights. Frozen, they may stay packed as released, in MXFP4, at
4.25 bits a weight: see frozen.py. `from_checkpoint` opens such a folder too.

Letters in shapes are model.py's and fast.py's, and r the rank.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from folders import Aside, exists, refuse_occupied
from frozen import MATRICES, Carried, FrozenExperts, pack
from model import GPTOSS, GPTOSSConfig, Router, wide
from mxfp4 import packed_shapes, unpacked
from shards import check_places, entry_bytes, read_header, read_json, read_places, weight_files
from weights import ADAPTERS, copy_rows, fill, first_rank, open_weights, stored_dtype

# --------------------------------------------------------------------------------------------------
# Layers with adapters


class LowRankLinear(nn.Linear):
    """Adapters are kept as linear layers keep their weights: lora_a (r, in), lora_b (out, r)."""

    def forward(self, x):  # (..., in)
        flat = x.flatten(0, -2)
        out = F.linear(flat, self.weight, self.bias)
        # in place: nothing in the backward reads the frozen layer's output
        out.addmm_(F.linear(flat, self.lora_a), self.lora_b.t(), alpha=self.lora_scale)
        return out.unflatten(0, x.shape[:-1])


class HostEmbedding(nn.Embedding):
    """A frozen embedding that may lie in host memory, from where a token's row comes to the
    device. That of the 20b takes 1.1 GiB, of which a step of 64K tokens reads a third."""

    def forward(self, tokens):
        return super().forward(tokens.to(self.weight.device)).to(tokens.device)


class LowRankRouter(Router):
    def logits(self, x):  # (N, C) -> (N, E), in fp32 as the frozen ones
        low = F.linear(wide(F.linear(x, self.lora_a)), wide(self.lora_b))
        return super().logits(x) + self.lora_scale * low


# --------------------------------------------------------------------------------------------------
# Attaching adapters

# What a target can name, beside MATRICES and WHOLE: where it is in a block
LINEAR = {"qkv": "attention.qkv", "out": "attention.out", "router": "mlp.router"}
GROUPS = {"attention": ("qkv", "out"), "experts": MATRICES, "all": (*LINEAR, *MATRICES)}
WHOLE = "embedding", "unembedding"  # as targets they have no adapters: they are trained themselves


def expand(targets):
    """("qkv", "out", "router") from "attention,router". ValueError for an unknown target."""
    known = {**{name: (name,) for name in (*LINEAR, *MATRICES, *WHOLE)}, **GROUPS}
    names = [name.strip() for name in targets.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"lora_targets={targets!r}: {unknown[0]!r} is none of {', '.join(known)}")
    return tuple(dict.fromkeys(name for n in names for name in known[n]))


def expand_layers(layers, number):
    """[0, 1, 2, 3, 12] from "0-3,12"; all from "". ValueError for what is no layer of `number`."""
    if not layers:
        return list(range(number))
    found = set()
    for part in layers.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            raise ValueError(f"lora_layers={layers!r}: write numbers and ranges, as in 0-3,12")
        part = range(int(first), int(last or first) + 1)
        if not part or part[-1] >= number:
            raise ValueError(f"lora_layers={layers!r}: the model has layers 0 to {number - 1}")
        found |= set(part)
    return sorted(found)


def adapt(model, rank=16, alpha=32.0, targets="attention", layers="", dtype=None, seed=0):
    """Freeze the model and attach adapters of this rank, in `dtype` or that of the layer, to the
    targets (names in GROUPS, LINEAR and MATRICES, separated by commas) in `layers` ("0-3,12"; "":
    all). Targets in WHOLE are trained themselves, in `dtype`. Adapters on the meta device are not
    initialised. ValueError for what does not exist or a rank that no matrix has."""
    model.requires_grad_(False)
    targets, layers = expand(targets), expand_layers(layers, len(model.blocks))
    for target in WHOLE:
        if target in targets:
            module = model.get_submodule(target)
            module.weight = nn.Parameter(module.weight.detach().to(dtype or module.weight.dtype))
    for block in map(model.blocks.__getitem__, layers):
        for target in targets:
            if target not in WHOLE:
                attach(block, target, rank, alpha / rank if rank else 0, dtype)
    if not model.embedding.weight.is_meta:
        init_adapters(model, seed)
    return model


def attach(block, target, rank, scale, dtype):
    """Put adapters beside one of a block's matrices."""
    if target in MATRICES:
        module, prefix = block.mlp, f"{target}_"
        module.__class__, like = FrozenExperts, module.down_bias
        (E, C), (_, two_f) = module.down_bias.shape, module.gate_up_bias.shape
        inputs, outputs = (C, two_f) if target == "gate_up" else (two_f // 2, C)
        shapes = (E, inputs, rank), (E, rank, outputs)
    else:
        module, prefix = block.get_submodule(LINEAR[target]), ""
        module.__class__ = LowRankRouter if target == "router" else LowRankLinear
        like, (outputs, inputs) = module.weight, module.weight.shape
        shapes = (rank, inputs), (outputs, rank)
    if not 0 < rank <= min(inputs, outputs):
        raise ValueError(
            f"lora_rank={rank}: {target} is a matrix {inputs} x {outputs}, so its adapters can "
            f"have ranks 1 to {min(inputs, outputs)}"
        )
    module.lora_scale = scale
    for letter, shape in zip("ab", shapes):
        factor = torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
        setattr(module, f"{prefix}lora_{letter}", nn.Parameter(factor))


def embed_on_host(model):
    """Move the embedding of a model in memory to the host's, if it is frozen."""
    if not model.embedding.weight.requires_grad:
        model.embedding.__class__ = HostEmbedding
        model.embedding.to("cpu")


def adapters(model):
    """{name: parameter} of what is trained: adapters, and targets in WHOLE."""
    return {name: p for name, p in model.named_parameters() if is_adapter(name) or p.requires_grad}


def base(model):
    """{name: parameter} of what is frozen."""
    trained = adapters(model)
    return {name: p for name, p in model.named_parameters() if name not in trained}


def original(model):
    """{name: parameter} of what the base's folder holds: all but adapters."""
    return {name: p for name, p in model.named_parameters() if not is_adapter(name)}


def is_adapter(name):
    return name.endswith(("lora_a", "lora_b"))


def stems(names):
    """What comes before lora_a and lora_b in the names of each pair of adapters."""
    return [name.removesuffix("lora_a") for name in names if name.endswith("lora_a")]


@torch.no_grad()
def init_adapters(model, seed=0):
    """A: normal, with a standard deviation of 1 / sqrt(in), so that x A is about as large as x. B:
    zero. The same on any number of ranks."""
    for number, (name, parameter) in enumerate(adapters(model).items()):
        if name.endswith("lora_b"):
            nn.init.zeros_(parameter)
        if not name.endswith("lora_a"):
            continue
        generator = torch.Generator(parameter.device).manual_seed(seed * 100003 + number)
        whole = torch.empty(parameter.shape, device=parameter.device)
        inputs = parameter.shape[1]  # of (r, in), or of (E, in, r)
        copy_rows(parameter, whole.normal_(0, inputs**-0.5, generator=generator))


# --------------------------------------------------------------------------------------------------
# Folders: adapters.json (rank, alpha, targets, layers, the base's folder and identity),
# adapters.safetensors, config.json. The base's weights stay where they are.

TENSORS = "adapters.safetensors"
SETTINGS = {"rank": int, "alpha": float, "targets": str, "layers": str}
SAMPLE = 4096  # bytes; of each tensor three samples are compared


def is_packed(folder):
    return any(name.endswith("_weight_blocks") for name in weight_files(folder))


def identity(folder):
    """A fingerprint of a checkpoint folder's weights: names, dtypes, shapes and a few kilobytes of
    each tensor."""
    digest = hashlib.sha256()
    for name, place in sorted(read_places(folder)[0].items()):
        if place is None:
            raise ValueError(f"{folder}: {name} cannot be read")
        digest.update(f"{name} {place.dtype} {place.shape}".encode())
        size = place.shape[0] * entry_bytes(place)
        with open(place.path, "rb") as file:
            for start in 0, (size - SAMPLE) // 2, size - SAMPLE:
                file.seek(place.offset + max(start, 0))
                digest.update(file.read(min(SAMPLE, size)))
    return digest.hexdigest()


def read_settings(folder):
    """adapters.json of a folder with adapters. ValueError if it is not one, or if the base is not
    there or is another one."""
    path = Path(folder) / ADAPTERS
    given = read_json(path)
    wanted = SETTINGS | {"base": str, "identity": str}
    for name, kind in wanted.items():
        if not isinstance(given.get(name), kind):
            raise ValueError(f"{path}: {name} is {given.get(name)!r}, not a {kind.__name__}")
    check_base(path, given)
    return given


def check_base(path, settings):
    """ValueError that names `path` if the base of adapters is not there, or is another one."""
    base = Path(settings["base"])
    if not base.is_dir():
        raise ValueError(f'{path}: the base {base} is not there; "base" may name another place')
    if identity(base) != settings["identity"]:
        raise ValueError(
            f"{path}: {base} holds other weights than those that the adapters were trained on"
        )


def adapt_with(model, settings, dtype=None):
    """adapt() by the SETTINGS among `settings`."""
    return adapt(model, **{name: settings[name] for name in SETTINGS}, dtype=dtype)


def from_checkpoint(folder, device="cpu", dtype=None, recompute="none"):
    """GPTOSS.from_checkpoint of a folder that may be packed, and stays packed in memory, or hold
    adapters, which are attached to their base. Errors: those of weights.load_weights and
    read_settings."""
    folder = Path(folder)
    settings = read_settings(folder) if exists(folder / ADAPTERS) else None
    source = Path(settings["base"]) if settings else folder
    model = from_base(source, settings, device, dtype, recompute)
    if settings:
        load_adapters(model, folder)
    return model


def from_base(source, settings, device="cpu", dtype=None, recompute="none"):
    """The model in the checkpoint folder `source`, with adapters whose values are not set if there
    are settings of some."""
    with torch.device("meta"):
        model = GPTOSS(GPTOSSConfig.from_json(source / "config.json"), recompute)
    model = model.to(dtype or stored_dtype(source))
    if is_packed(source):
        pack(model)
    if settings:
        adapt_with(model, settings)
    model.to_empty(device=device)
    fill_base(model, source)
    return model


def load_adapters(model, folder):
    places, wanted = open_adapters(folder), adapters(model)
    check_places(folder, places, [], {name: tuple(p.shape) for name, p in wanted.items()})
    fill(wanted, places, folder)


def open_adapters(folder):
    """{name: Place} of the adapters in a folder."""
    try:
        return read_header(Path(folder) / TENSORS)
    except Exception as error:  # safetensors has an exception for each way to be wrong
        raise ValueError(f"{Path(folder) / TENSORS}: cannot be read ({error})") from None


@torch.no_grad()
def save_adapters(model, folder, settings, write_config):
    """Write a folder with the model's adapters, which may replace an older one; `settings` as
    read_settings returns them. All ranks of a sharded model call this together; the first writes.
    ValueError if `folder` holds anything but adapters."""
    folder, tensors = Path(folder), {}
    if exists(folder) and any(folder.iterdir()) and not exists(folder / ADAPTERS):
        raise ValueError(f"{folder} holds something other than adapters: name another folder")
    for name, parameter in adapters(model).items():
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        if first_rank():
            tensors[name] = whole.detach().cpu().contiguous()
    if first_rank():
        with Aside(folder, replace=True) as aside:
            (aside / TENSORS).write_bytes(safetensors.torch.save(tensors))
            (aside / ADAPTERS).write_text(json.dumps(settings, indent=2) + "\n")
            write_config(aside / "config.json")


# --------------------------------------------------------------------------------------------------
# What train.py asks for


def check_run(options, config):
    """ValueError if train.py cannot train the adapters that `options` describe on the weights in
    options.checkpoint."""
    folder = options.checkpoint
    with torch.device("meta"):
        model = GPTOSS(config)
    adapt_as(options, model, None)
    if options.frozen == "mxfp4" and not is_packed(folder):
        raise ValueError(
            f"frozen=mxfp4: {folder} holds unpacked experts. convert_hf.py --packed keeps those of "
            "a released model as they are; --frozen=bf16 trains on these"
        )
    open_base(model, folder)


def adapt_as(options, model, dtype):
    """Pack and adapt a model on the meta device; `dtype` is the adapters'."""
    if options.frozen == "mxfp4":
        # FSDP's sharded parameters need a dtype that it leaves alone
        pack(model, model.embedding.weight.dtype if options.shard_frozen else torch.uint8)
    return adapt_with(model, chosen(options), dtype)


def chosen(options):
    """The SETTINGS of a run."""
    return {name: getattr(options, f"lora_{name}") for name in SETTINGS}


@torch.no_grad()
def load_base(model, folder, seed):
    """Fill a model with its base from a checkpoint folder, or without one at random, and start new
    adapters."""
    if folder:
        fill_base(model, folder)
    else:
        model.init_weights(seed)
        for name, p in original(model).items():
            local = p.to_local() if isinstance(p, DTensor) else p
            if name.endswith("_blocks"):
                local.view(torch.uint8).random_(256)
            elif name.endswith("_scales"):
                local.view(torch.uint8).fill_(119)  # values up to 6 / 256
    init_adapters(model, seed)


def fill_base(model, folder):
    """weights.load_weights of everything but the adapters."""
    fill(original(model), open_base(model, folder), folder)


def open_base(model, folder):
    """weights.open_weights of everything but the adapters, whatever dtype carries what is
    packed."""
    config, wanted, shapes = model.config, original(model), {}
    E, C, F = config.num_experts, config.hidden_size, config.intermediate_size
    sizes = {"gate_up": (E, C, 2 * F), "down": (E, F, C)}
    for name, parameter in wanted.items():
        matrix, _, part = name.rpartition(".")[2].rpartition("_weight_")
        shape = packed_shapes(*sizes[matrix])[part] if matrix in sizes else parameter.shape
        shapes[name] = torch.empty(shape, device="meta")
    places = open_weights(shapes, folder)
    carried = {name: p.dtype for name, p in wanted.items() if p.shape != shapes[name].shape}
    return places | {name: Carried(places[name], dtype) for name, dtype in carried.items()}


def settings_of(options):
    """adapters.json of a run."""
    folder = options.checkpoint
    return chosen(options) | {"base": folder, "identity": identity(folder) if folder else ""}


def describe(options, model):
    """What is trained and what is not, in words."""
    held = sum(p.numel() * p.element_size() for p in base(model).values())
    packed = "experts packed in MXFP4" if options.frozen == "mxfp4" else "in bf16"
    where = "shared among the ranks" if options.shard_frozen else "on each rank"
    layers = f" in layers {options.lora_layers}" if options.lora_layers else ""
    return (
        f"adapters of rank {options.lora_rank} on {options.lora_targets}{layers}, "
        f"frozen weights {held / 2**30:.1f} GiB {where}, {packed}"
    )


def identity_of(options):
    """What may not change when a run of adapters is resumed; {} for a run without."""
    if not options.lora_rank:
        return {}
    return {f"lora_{name}" if name in SETTINGS else name: value
            for name, value in settings_of(options).items() if name != "base"}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# What convert_hf.py exports: adapters merged into their base


@dataclass(frozen=True)
class Retyped:
    """What `place` shows, as shards.Place shows a tensor that a file holds, in `dtype`."""

    place: object
    dtype: torch.dtype

    @property
    def shape(self):
        return self.place.shape

    def __getitem__(self, entries):
        return self.place[entries].to(self.dtype)


@dataclass(frozen=True)
class Merged(Retyped):
    """The matrix that `place` shows, with its adapters added."""

    a: torch.Tensor  # (r, in) or (E, in, r)
    b: torch.Tensor  # (out, r) or (E, r, out)
    scale: float

    def __getitem__(self, entries):
        weight = wide(self.place[entries])
        if self.a.dim() == 2:  # a linear layer's, whose matrix is (out, in)
            product = self.b[entries] @ self.a
        else:
            product = self.a[entries] @ self.b[entries]
        return (weight + self.scale * product.to(weight.dtype)).to(self.dtype)


def places(folder):
    """({our name: Place, Unpacked, Retyped or Merged}, problems) of a checkpoint folder, plain,
    packed or with adapters."""
    folder = Path(folder)
    if not exists(folder / ADAPTERS):
        found, problems = read_places(folder)
        return unpacked(found), problems
    return merged(folder, read_settings(folder), open_adapters(folder))


def merged(folder, settings, stored):
    """`places` of the base, with what `folder` trained, `stored` {name: Place}, merged into it."""
    found, problems = places(settings["base"])
    for name in stored.keys() & found.keys():  # trained themselves
        found[name] = Retyped(stored[name], found[name].dtype)
    factors = {name: wide(place[:]) for name, place in stored.items() if is_adapter(name)}
    for name in stems(factors):
        weight = f"{name}weight"  # of "….qkv." or "….gate_up_"
        if weight not in found:
            raise ValueError(f"{folder}: adapters for {weight}, which the base does not have")
        pair = factors[f"{name}lora_a"], factors[f"{name}lora_b"]
        scale = settings["alpha"] / settings["rank"]
        found[weight] = Merged(found[weight], found[weight].dtype, *pair, scale)
    return found, problems


# --------------------------------------------------------------------------------------------------
# PEFT's layout, https://github.com/huggingface/peft, for transformers' gpt-oss

PEFT_MODULES = {  # ours: theirs
    "attention.qkv.": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out.": ("self_attn.o_proj",),
}
PEFT_WHOLE = {"embedding.weight": "embed_tokens", "unembedding.weight": "lm_head"}
PEFT_PARAMETERS = {  # ours: their module, and the parameter in it
    "mlp.router.": ("mlp.router", "weight"),
    "mlp.gate_up_": ("mlp.experts", "gate_up_proj"),
    "mlp.down_": ("mlp.experts", "down_proj"),
}


def peft_tensors(name, a, b, config):
    """{their module: (A, B)} of one pair of adapters, `name` without its block. q, k and v share A.
    The experts' factors are laid side by side: A (E r, in), B (out, r E)."""
    if name == "attention.qkv.":
        heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        parts = b.split([config.head_dim * n for n in heads])
        return {module: (a, part) for module, part in zip(PEFT_MODULES[name], parts)}
    if name in PEFT_MODULES:
        return {PEFT_MODULES[name][0]: (a, b)}
    module, _ = PEFT_PARAMETERS[name]
    if name == "mlp.router.":
        return {module: (a, b)}
    if name == "mlp.gate_up_":  # there gate and up columns alternate
        b = torch.stack(b.chunk(2, dim=-1), dim=-1).flatten(-2)
    return {module: (a.mT.flatten(0, 1), b.permute(2, 1, 0).flatten(1))}


RELEASED = {  # models of openai/ on the Hub: sizes in which they differ from GPTOSSConfig()
    "gpt-oss-20b": {},
    "gpt-oss-120b": {"num_hidden_layers": 36, "num_experts": 128},
}


def released(folder, config):
    """The name on the Hub of the released model that is in `folder`, by the name that
    convert_hf.py gives an import and by its sizes; or None."""
    name = Path(folder).name.removesuffix("-packed")
    if name in RELEASED and config == replace(GPTOSSConfig(), **RELEASED[name]):
        return f"openai/{name}"
    return None


def write_peft(folder, out, base=None):
    """Write adapters as adapter_config.json and adapter_model.safetensors, which PEFT loads on
    transformers' model of the base: PeftModel.from_pretrained(model, out). Experts' adapters want
    a base that is not packed there, Mxfp4Config(dequantize=True). `base`: the name or folder of
    that model, which AutoPeftModelForCausalLM opens; None: as `released` knows it, because
    transformers cannot open a base of ours. Returns the name that was written, or None. ValueError
    if `folder` holds no adapters, or `out` anything."""
    if not exists(Path(folder) / ADAPTERS):
        raise ValueError(f"{folder} holds no adapters: export it without --adapter")
    refuse_occupied(Path(out))
    settings = read_settings(folder)
    config = GPTOSSConfig.from_json(Path(settings["base"]) / "config.json")
    base = base or released(settings["base"], config)
    opened, tensors, modules, parameters = open_adapters(folder), {}, {}, {}
    for stem in stems(opened):
        _, layer, name = stem.split(".", 2)
        place = f"layers.{layer}."
        a, b = (opened[f"{stem}lora_{letter}"][:] for letter in "ab")
        if name in PEFT_MODULES:
            modules |= {f"{place}{module}": None for module in PEFT_MODULES[name]}
        else:
            parameters[f"{place}{'.'.join(PEFT_PARAMETERS[name])}"] = None
        # a module with two adapted parameters is wrapped twice, the second around the first
        both = f"blocks.{layer}.mlp.down_lora_a" in opened and name == "mlp.gate_up_"
        for module, pair in peft_tensors(name, a, b, config).items():
            prefix = f"base_model.model.model.{place}{module}.{'base_layer.' if both else ''}"
            for letter, factor in zip("AB", pair):
                tensors[f"{prefix}lora_{letter}.weight"] = factor.contiguous().clone()
    for name in PEFT_WHOLE.keys() & opened.keys():
        place = "model." * (name == "embedding.weight") + PEFT_WHOLE[name]
        tensors[f"base_model.model.{place}.weight"] = opened[name][:].clone()
    given = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings["rank"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(PEFT_WHOLE[name] for name in PEFT_WHOLE.keys() & opened.keys())
        or None,
    }
    with Aside(out) as aside:
        (aside / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors))
        (aside / "adapter_config.json").write_text(json.dumps(given, indent=2) + "\n")
    return base
