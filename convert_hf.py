"""Weights in and out: a released GPT-OSS becomes a checkpoint folder of ours, and ours one that everybody else loads.

    python convert_hf.py openai/gpt-oss-20b                        # Hub name or local folder -> checkpoints/gpt-oss-20b
    python convert_hf.py my-download --out my-folder               # the same, from a folder, to a place of your choice
    python convert_hf.py openai/gpt-oss-20b --verify               # ours against transformers' on one prompt
    python convert_hf.py --export runs/my-run --out my-model       # -> a folder for transformers and vLLM
    python convert_hf.py --export runs/my-run --out my-model --mxfp4

Three layouts are read: Hugging Face's with its experts in bf16 or in MXFP4, and OpenAI's own (`original/` on the Hub).
Both ways the two sets of names must be equal and every shape as expected before a byte is written; dtypes stay as they
are stored, MXFP4 becomes bf16, exactly. Tensors pass in slices of a few rows, so that a laptop's memory is enough, and
the folder appears under its name only when it is whole.

References: MXFP4, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf;
safetensors' file format, https://github.com/huggingface/safetensors; the layouts, https://huggingface.co/openai/gpt-oss-20b.

Letters in shapes: E experts    G groups of 32 values that share a scale
"""

import argparse
import functools
import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from model import GPTOSS, GPTOSSConfig
from mxfp4 import DEVICE, GROUP, dequantize_mxfp4, quantize_mxfp4
from weights import COMPANIONS, HF_CONFIG, INDEX, SHARD_BYTES, Aside, copy_companions, weight_files

SLICE_BYTES = 4_000_000  # what is converted at a time; one expert, if that is more
THREADS = 4  # slices under way at once, so that reading, converting and writing overlap

# ----------------------------------------------------------------------------------------------------------------------
# Layouts: which tensors stand for one of ours elsewhere, and what turns one into the other

HUGGING_FACE, OPENAI = 0, 1
NAMES = {  # ours: (Hugging Face's, OpenAI's); N is a block's number, and Hugging Face keeps q, k and v apart
    "embedding.weight": ("model.embed_tokens.weight", "embedding.weight"),
    "blocks.N.attention_norm.weight": (
        "model.layers.N.input_layernorm.weight",
        "block.N.attn.norm.scale",
    ),
    "blocks.N.attention.qkv.weight": (
        "model.layers.N.self_attn.qkv_proj.weight",
        "block.N.attn.qkv.weight",
    ),
    "blocks.N.attention.qkv.bias": (
        "model.layers.N.self_attn.qkv_proj.bias",
        "block.N.attn.qkv.bias",
    ),
    "blocks.N.attention.sinks": ("model.layers.N.self_attn.sinks", "block.N.attn.sinks"),
    "blocks.N.attention.out.weight": (
        "model.layers.N.self_attn.o_proj.weight",
        "block.N.attn.out.weight",
    ),
    "blocks.N.attention.out.bias": (
        "model.layers.N.self_attn.o_proj.bias",
        "block.N.attn.out.bias",
    ),
    "blocks.N.mlp_norm.weight": (
        "model.layers.N.post_attention_layernorm.weight",
        "block.N.mlp.norm.scale",
    ),
    "blocks.N.mlp.router.weight": ("model.layers.N.mlp.router.weight", "block.N.mlp.gate.weight"),
    "blocks.N.mlp.router.bias": ("model.layers.N.mlp.router.bias", "block.N.mlp.gate.bias"),
    "blocks.N.mlp.gate_up_weight": (
        "model.layers.N.mlp.experts.gate_up_proj",
        "block.N.mlp.mlp1_weight",
    ),
    "blocks.N.mlp.gate_up_bias": (
        "model.layers.N.mlp.experts.gate_up_proj_bias",
        "block.N.mlp.mlp1_bias",
    ),
    "blocks.N.mlp.down_weight": ("model.layers.N.mlp.experts.down_proj", "block.N.mlp.mlp2_weight"),
    "blocks.N.mlp.down_bias": (
        "model.layers.N.mlp.experts.down_proj_bias",
        "block.N.mlp.mlp2_bias",
    ),
    "norm.weight": ("model.norm.weight", "norm.scale"),
    "unembedding.weight": ("lm_head.weight", "unembedding.weight"),
}


class Counterpart(NamedTuple):
    """One of our tensors, and those of another layout that hold the same numbers."""

    name: str
    shape: tuple[int, ...]
    theirs: dict[str, tuple[int, ...]]  # name -> shape
    to_ours: Callable  # rows of each of theirs -> the same rows of ours
    to_theirs: Callable  # rows of ours -> a tuple, the same rows of each of theirs
    mxfp4: bool = False


def deinterleave(x):
    """Columns (gate, up, gate, up, …), as theirs -> all gates, then all ups, as ours."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def interleave(x):
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


def counterpart(name, shape, config, layout, mxfp4):
    """The Counterpart in `layout`, with its experts in MXFP4 or not, of our tensor `name`."""
    number = "".join(re.findall(r"\d+", name))
    their = NAMES[re.sub(r"\d+", "N", name)][layout].replace(".N.", f".{number}.")
    if ".qkv." in name and layout == HUGGING_FACE:
        rows = [
            config.head_dim * n
            for n in (config.num_attention_heads, *2 * [config.num_key_value_heads])
        ]
        theirs = {their.replace("qkv", letter): (n, *shape[1:]) for letter, n in zip("qkv", rows)}
        return Counterpart(
            name, shape, theirs, lambda *qkv: torch.cat(qkv), lambda qkv: qkv.split(rows)
        )
    ours, back = (
        (deinterleave, interleave)
        if "gate_up" in name
        else (torch.Tensor.contiguous, torch.Tensor.contiguous)
    )
    transposed = name.endswith(("gate_up_weight", "down_weight")) and (mxfp4 or layout == OPENAI)
    if not transposed:
        return Counterpart(name, shape, {their: shape}, ours, lambda x: (back(x),))
    experts, inputs, outputs = shape
    if not mxfp4:
        return Counterpart(
            name,
            shape,
            {their: (experts, outputs, inputs)},
            lambda x: ours(x.mT),
            lambda x: (back(x).mT,),
        )
    if inputs % GROUP:
        raise ValueError(
            f"{name}: MXFP4 needs a multiple of {GROUP} inputs, and this has {inputs}: export without --mxfp4"
        )
    groups, joint = (experts, outputs, inputs // GROUP), ("_", ".")[layout]
    theirs = {f"{their}{joint}blocks": (*groups, GROUP // 2), f"{their}{joint}scales": groups}
    unpack, pack = (
        lambda *packed: ours(dequantize_mxfp4(*packed).mT),
        lambda x: quantize_mxfp4(back(x.to(DEVICE)).mT),
    )
    return Counterpart(name, shape, theirs, unpack, pack, mxfp4=True)


def counterparts(config, layout, mxfp4):
    """Of every parameter of the model, in its order."""
    with torch.device("meta"):
        parameters = dict(GPTOSS(config).named_parameters())
    return [
        counterpart(name, tuple(p.shape), config, layout, mxfp4) for name, p in parameters.items()
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors files: 8 bytes with the length of a header, the header (JSON: name -> dtype, shape, place), the tensors.
# Read and written by place, so that slices of a tensor come and go from several threads, and none is held whole.

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Where a tensor lies: from byte `offset` of the file `path`."""

    path: Path
    offset: int
    dtype: torch.dtype  # or its name in the file, if it is none of DTYPES
    shape: tuple[int, ...]

    def row_bytes(self):
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def read(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        at = self.offset + start * self.row_bytes()
        data = np.fromfile(self.path, np.uint8, count=(stop - start) * self.row_bytes(), offset=at)
        return torch.from_numpy(data).view(self.dtype).view(-1, *self.shape[1:])

    def write(self, rows, tensor):
        data = tensor.to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        try:
            with open(self.path, "r+b") as file:
                file.seek(self.offset + (rows.start or 0) * self.row_bytes())
                data.tofile(file)
        except OSError as error:  # numpy's does not say where, nor why
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(
                f"cannot write {self.path}, with {free / 1e9:.1f} GB free on its disk: {error}"
            ) from None


def read_header(path):
    """{name: Place} of a safetensors file, after safetensors has found header and length in order."""
    with safe_open(path, "pt"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            path,
            8 + length + x["data_offsets"][0],
            DTYPES.get(x["dtype"], x["dtype"]),
            tuple(x["shape"]),
        )
        for name, x in header.items()
    }


def read_places(folder):
    """({name: Place} of the tensors in a folder, [what is wrong with its files])."""
    places, problems = {}, []
    indexed = (folder / INDEX).exists()
    for path in sorted(
        set(weight_files(folder).values()) if indexed else folder.glob("*.safetensors")
    ):
        try:
            found = read_header(path)
        except (
            Exception
        ) as error:  # safetensors has its own exception for each way a file can be wrong
            problems.append(f"{path.name} is missing, truncated or no safetensors file ({error})")
            continue
        problems += [
            f"{name} is in {path.name} and in {places[name].path.name}"
            for name in found.keys() & places.keys()
        ]
        places |= found
    if not places:
        raise ValueError(
            "\n  ".join([f"{folder}: no tensors in safetensors files here", *problems])
        )
    return places, problems


def create_shards(folder, tensors):
    """Make files of about SHARD_BYTES with room for tensors {name: (dtype, shape)}, and their index; returns {name: Place}."""
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    before = dict(zip(nbytes, itertools.accumulate(nbytes.values(), initial=0)))
    shards = [
        list(names)
        for _, names in itertools.groupby(tensors, lambda name: before[name] // SHARD_BYTES)
    ]
    places = {}
    for number, names in enumerate(shards, 1):
        path, header, end = (
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors",
            {"__metadata__": {"format": "pt"}},
            0,
        )
        for name in sorted(
            names, key=lambda name: -tensors[name][0].itemsize
        ):  # large dtypes first, so that all are aligned
            dtype, shape = tensors[name]
            header[name] = {
                "dtype": CODES[dtype],
                "shape": shape,
                "data_offsets": [end, end + nbytes[name]],
            }
            end += nbytes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        places |= read_header(path)
    index = {
        "metadata": {"total_size": sum(nbytes.values())},
        "weight_map": {name: places[name].path.name for name in tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return places


# ----------------------------------------------------------------------------------------------------------------------
# One conversion, either way


def check(folder, places, problems, expected):
    """Raise one ValueError with every problem: of the files, and where `places` are not the expected {name: shape}.

    A name that ends in blocks or scales holds uint8, any other floats."""
    problems = problems + [
        f"missing {name} {expected[name]}" for name in expected if name not in places
    ]
    for name, place in places.items():
        if name not in expected:
            problems.append(f"unexpected {name} {place.shape}")
        elif place.shape != expected[name]:
            problems.append(
                f"{name} has shape {place.shape}, and the config asks for {expected[name]}"
            )
        elif place.dtype not in CODES or name.endswith(("blocks", "scales")) != (
            place.dtype == torch.uint8
        ):
            problems.append(f"{name} has dtype {place.dtype}")
    if problems:
        raise ValueError(
            "\n  ".join([f"{folder}: {len(problems)} problems, nothing was converted", *problems])
        )


def row_slices(places):
    """Slices of the first dimension, the same in all `places`, of about SLICE_BYTES; of places that differ in it, all rows
    at once: those are q, k and v, which are small."""
    length = places[0].shape[0]
    if any(place.shape[0] != length for place in places):
        return [slice(None)]
    step = max(1, SLICE_BYTES // max(place.row_bytes() for place in places))
    return [slice(i, i + step) for i in range(0, length, step)]


def convert(jobs):
    """Run jobs (function, places to read, places to write), slice by slice, in a few threads, and print the speed."""

    def run(work):
        function, sources, targets, rows = work
        for place, result in zip(
            targets, function(*(place.read(rows) for place in sources)), strict=True
        ):
            assert result.shape[1:] == place.shape[1:]
            place.write(rows, result)
            bar.update(place.row_bytes() * len(result))

    slices = [(*job, rows) for job in jobs for rows in row_slices([*job[1], *job[2]])]
    written = [place for _, _, targets in jobs for place in targets]
    total, began = sum(place.shape[0] * place.row_bytes() for place in written), time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=total, unit="B", unit_scale=True) as bar:
        for _ in pool.map(run, slices):  # raises what a slice raised
            pass
    for path in {place.path for place in written}:
        with open(path, "r+b") as file:
            os.fsync(file.fileno())  # whole means on the disk
    seconds = time.perf_counter() - began
    print(f"{total / 1e9:.3f} GB written in {seconds:.1f} s: {total / 1e9 / seconds:.2f} GB/s")


def refuse_occupied(out):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: remove it, or choose another --out")


# ----------------------------------------------------------------------------------------------------------------------
# Import


def fetch(source):
    """A local folder as it is; a Hub name: the folder into which its top-level files were downloaded."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"{source}: no such folder, and no name on the Hub (like openai/gpt-oss-20b) either"
        )
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    try:  # the patterns' * also matches a slash: without the second list, copies in other layouts would come along
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (
        OSError,
        ValueError,
    ) as error:  # what huggingface_hub raises for an unknown name, no access, no network
        raise ValueError(
            f"{source}: no such folder here, and the download failed: {error}"
        ) from error


def find_layout(folder, names):
    """(layout, whether its experts are in MXFP4)."""
    for prefix, layout in ("model.layers.", HUGGING_FACE), ("block.", OPENAI):
        if any(name.startswith(prefix) for name in names):
            return layout, any(name.endswith(("_blocks", ".blocks")) for name in names)
    raise ValueError(
        f"{folder}: neither Hugging Face's nor OpenAI's names, but {min(names)}, …: is it converted already?"
    )


def import_checkpoint(source, out):
    """Convert the folder or Hub name `source` into the checkpoint folder `out`. ValueError, and no folder, if it is broken."""
    refuse_occupied(out)
    folder = fetch(source)
    config = GPTOSSConfig.from_json(folder / "config.json")
    places, problems = read_places(folder)
    layout, mxfp4 = find_layout(folder, places)
    print(
        f"{folder}: {('Hugging Face', 'OpenAI')[layout]}'s layout, experts in {'MXFP4' if mxfp4 else 'plain floats'}"
    )
    pairs = counterparts(config, layout, mxfp4)
    check(
        folder,
        places,
        problems,
        {name: shape for pair in pairs for name, shape in pair.theirs.items()},
    )

    def dtype(pair):
        stored = functools.reduce(torch.promote_types, (places[name].dtype for name in pair.theirs))
        return torch.bfloat16 if pair.mxfp4 else stored

    with Aside(out.resolve()) as aside:
        ours = create_shards(aside, {pair.name: (dtype(pair), pair.shape) for pair in pairs})
        convert(
            [
                (
                    lambda *x, p=p: (p.to_ours(*x),),
                    [places[name] for name in p.theirs],
                    [ours[p.name]],
                )
                for p in pairs
            ]
        )
        config.to_json(aside / "config.json")
        if layout == HUGGING_FACE:
            shutil.copyfile(folder / "config.json", aside / HF_CONFIG)
        copy_companions(folder, aside)


# ----------------------------------------------------------------------------------------------------------------------
# Export


def hf_config(config, dtype, mxfp4, source):
    """Hugging Face's config.json for `config`; `source`: the one that came with the weights, or {}.

    Rotary settings are written as the released models have them, which every version of transformers reads."""
    tokens = (
        {"eos_token_id": 200_002, "pad_token_id": 199_999}
        if config.vocab_size == GPTOSSConfig.vocab_size
        else {}
    )
    outdated = ("quantization_config", "rope_parameters", "dtype")
    renamed = ("num_experts", "rope_scaling_factor", "rope_ntk_alpha", "rope_ntk_beta")
    given = tokens | {name: value for name, value in source.items() if name not in outdated}
    given |= {name: value for name, value in asdict(config).items() if name not in renamed}
    given |= {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention"
            for layer in range(config.num_hidden_layers)
        ],
        "attention_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": config.rope_scaling_factor,
            "beta_fast": config.rope_ntk_beta,
            "beta_slow": config.rope_ntk_alpha,
            "original_max_position_embeddings": config.initial_context_length,
            "truncate": False,
        },
    }
    if mxfp4:
        modules = [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ]
        given["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    return given


def export_checkpoint(run, out, mxfp4=False, dtype=None, tokenizer=None):
    """Write the checkpoint folder or training run `run` for others to load. dtype None: each tensor's own.

    tokenizer: a folder with the tokenizer's files, if `run` has none or others."""
    refuse_occupied(out)
    if tokenizer and not tokenizer.is_dir():
        raise FileNotFoundError(f"--tokenizer {tokenizer}: no such folder")
    folder = run / "model" if (run / "model").is_dir() else run
    if (folder / "metrics.jsonl").exists():
        raise ValueError(
            f"{run}: this run has no model/ yet. train.py with --resume=true finishes it"
        )
    config = GPTOSSConfig.from_json(folder / "config.json")
    places, problems = read_places(folder)
    if not any(name.startswith("blocks.") for name in places):
        raise ValueError(f"{folder} is no checkpoint of ours: import it first")
    pairs = counterparts(config, HUGGING_FACE, mxfp4)
    check(folder, places, problems, {pair.name: pair.shape for pair in pairs})
    squares = []  # of the error and of the weights, of each slice that is quantized

    def to_theirs(pair, weight):
        theirs = pair.to_theirs(weight)
        if pair.mxfp4:
            weight = weight.to(DEVICE).float()
            squares.append([x.norm().item() ** 2 for x in (pair.to_ours(*theirs) - weight, weight)])
        return theirs

    stored = {
        pair.name: torch.uint8 if pair.mxfp4 else dtype or places[pair.name].dtype for pair in pairs
    }
    with Aside(out.resolve()) as aside:
        theirs = create_shards(
            aside,
            {name: (stored[p.name], shape) for p in pairs for name, shape in p.theirs.items()},
        )
        convert(
            [
                (
                    functools.partial(to_theirs, p),
                    [places[p.name]],
                    [theirs[name] for name in p.theirs],
                )
                for p in pairs
            ]
        )
        if mxfp4:
            error, weights = map(sum, zip(*squares))
            print(
                f"MXFP4 experts: relative error {math.sqrt(error / weights) if weights else 0.0:.3e}"
            )
        source = (
            json.loads((folder / HF_CONFIG).read_text()) if (folder / HF_CONFIG).exists() else {}
        )
        given = hf_config(config, stored["norm.weight"], mxfp4, source)
        (aside / "config.json").write_text(json.dumps(given, indent=2) + "\n")
        for files in filter(None, (folder, tokenizer)):
            copy_companions(files, aside)
    turned = int(
        config.initial_context_length * config.rope_scaling_factor
    )  # positions in vLLM's rotary table
    constants = {
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "max_position_embeddings": min(turned, config.max_position_embeddings),
    }
    for name, value in constants.items():
        if getattr(config, name) != value:
            print(
                f"note: {name} is {getattr(config, name)}; vLLM 0.32 computes as if it were {value}"
            )


# ----------------------------------------------------------------------------------------------------------------------
# Verification


def free_memory():
    """Bytes that a model may take: of the GPU, or of the host with what its file cache would give back."""
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(meminfo["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # no Linux: half of what there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@torch.no_grad()
def verify(source, folder):
    """Compare logprobs of the checkpoint `folder` with transformers' of its `source`. ValueError unless they agree.

    A comparison that cannot fail proves nothing: with gates and ups exchanged, a mistake no shape reveals, ours must
    differ. In fp32 where the model fits, and then no token may differ. Else in bf16, where rounding sends some tokens to
    other experts: there the median token is judged."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
    except ImportError as error:
        raise ValueError("--verify compares with transformers: pip install transformers") from error
    source, config = fetch(source), GPTOSSConfig.from_json(folder / "config.json")
    parameters = sum(math.prod(place.shape) for place in read_places(folder)[0].values())
    exact = 4 * parameters < 0.8 * free_memory()
    dtype, tolerance, judged = (
        (torch.float32, 1e-3, torch.max) if exact else (torch.bfloat16, 0.5, torch.median)
    )

    tokenizer = (source / "tokenizer.json").exists() and AutoTokenizer.from_pretrained(source)
    prompt = __doc__  # longer than the sliding window
    ids = (
        tokenizer(prompt)["input_ids"]
        if tokenizer
        else [byte % config.vocab_size for byte in prompt.encode()]
    )
    tokens = torch.tensor([ids[: min(256, config.max_position_embeddings)]], device=DEVICE)

    quantized = "quantization_config" in json.loads((source / "config.json").read_text())
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).to(DEVICE, dtype)
    expected = theirs(tokens).logits.float().log_softmax(-1)
    del theirs
    ours = GPTOSS.from_checkpoint(folder, DEVICE, dtype)

    def difference():  # of each token, the largest over the vocabulary
        return (ours(tokens).float().log_softmax(-1) - expected).abs().amax(-1)

    found = difference()
    for block in ours.blocks:
        block.mlp.gate_up_weight.copy_(
            block.mlp.gate_up_weight.roll(config.intermediate_size, dims=-1)
        )
    control = difference()
    what = f"{len(tokens[0])} tokens in {str(dtype).removeprefix('torch.')}, largest difference of a logprob from transformers'"
    print(f"{what}: {found.max():.2e}, and {found.median():.2e} for the median token")
    print(f"with gates and ups exchanged: {control.max():.2e} and {control.median():.2e}")
    if not judged(found) < min(tolerance, judged(control) / 10):
        mend = "convert it again"
        if not exact:
            mend += f", or verify it in fp32, with {5 * parameters / 1e9:.0f} GB of memory free: bf16 may be too coarse to tell"
        raise ValueError(f"{folder} does not compute what {source} does: {mend}")


# ----------------------------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", nargs="?", help="what to import: a name on the Hub, or a folder")
    parser.add_argument(
        "--out",
        type=Path,
        help="the new folder; an import's default is checkpoints/ and the source's last part",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="convert what is not converted yet, then compare with transformers",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="RUN",
        help="a training run or checkpoint folder to export instead",
    )
    parser.add_argument("--mxfp4", action="store_true", help="export experts in MXFP4")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of an export's tensors; default: as they are stored",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="where an export's tokenizer files lie, if not in RUN",
    )
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.export is None):
        parser.error("give either a source to import or --export RUN")
    if options.export and (options.verify or not options.out):
        parser.error("--export needs --out DIR, and has no --verify")
    if options.source and (options.mxfp4 or options.dtype or options.tokenizer):
        parser.error("--mxfp4, --dtype and --tokenizer belong to --export")
    try:
        if options.export:
            dtype = getattr(torch, options.dtype) if options.dtype else None
            export_checkpoint(options.export, options.out, options.mxfp4, dtype, options.tokenizer)
            print(f"{options.out} is ready for transformers and vLLM")
            return
        out = options.out or Path("checkpoints") / Path(options.source).resolve().name
        if not (options.verify and (out / "config.json").exists()):
            import_checkpoint(options.source, out)
            print(f"{out} is ready")
        if options.verify:
            verify(options.source, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
