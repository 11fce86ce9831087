"""Weights in and out: a released GPT-OSS becomes a checkpoint folder of ours, and ours one that
transformers and vLLM load.

    python convert_hf.py openai/gpt-oss-20b            # from the Hub -> checkpoints/gpt-oss-20b
    python convert_hf.py my-download --out my-folder   # a local folder, to a place of your choice
    python convert_hf.py openai/gpt-oss-20b --packed   # experts stay in MXFP4: a third of the disk
    python convert_hf.py openai/gpt-oss-20b --verify   # ours against transformers' on one prompt
    python convert_hf.py --export runs/my-run --out my-model
    python convert_hf.py --export runs/my-run --out my-model --mxfp4
    python convert_hf.py --export runs/my-run --state=best --out my-model    # a saved state
    python convert_hf.py --export runs/my-lora --out my-adapters --adapter   # for PEFT

Three layouts are read: Hugging Face's with its experts in bf16 or in MXFP4, and OpenAI's own
(`original/` on the Hub). Before a byte is written the two sets of names must be equal, both ways,
and every shape as expected. Dtypes stay as stored; MXFP4 becomes bf16, exactly. Tensors pass in
slices of a few megabytes, so a laptop's memory is enough.

--packed keeps the experts' matrices as uint8: blocks.N.mlp.gate_up_weight becomes
blocks.N.mlp.gate_up_weight_blocks (E, out, G, 16) and …_scales (E, out, G), the same for
down_weight. Unpacked and transposed they are bitwise the bf16 matrix (E, in, out), gates first.

Reference: the layouts, https://huggingface.co/openai/gpt-oss-20b

Letters in shapes: E experts    G groups of 32 values that share a scale
"""

import argparse
import functools
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import lora
from folders import Aside, exists, refuse_occupied
from model import GPTOSS, GPTOSSConfig
from mxfp4 import dequantize_mxfp4, packed_shapes, quantize_mxfp4
from shards import check_places, create_shards, entry_bytes, listed, read_json, read_places
from snapshots import find_exported
from text.tokenizer import TOKENIZERS, HarmonyTokenizer
from weights import (
    COMPANIONS,
    HF_CONFIG,
    check_layers,
    copy_companions,
    find_model,
    free_memory,
    hf_config,
    layout_of,
    unread_keys,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where MXFP4 is packed and unpacked
TOKENIZER = "tokenizer.json"  # without it transformers and vLLM have no tokenizer
SLICE_BYTES = 4_000_000  # converted at a time; one expert, if that is more
THREADS = 4  # slices in flight, so that reading, converting and writing overlap

# --------------------------------------------------------------------------------------------------
# Layouts: which tensors elsewhere hold one of ours, and what turns one into the other

HUGGING_FACE, OPENAI = LAYOUTS = ("hugging_face", "openai")
NAMES = {  # ours: (Hugging Face's, OpenAI's)
    "embedding.weight": ("model.embed_tokens.weight", "embedding.weight"),
    "norm.weight": ("model.norm.weight", "norm.scale"),
    "unembedding.weight": ("lm_head.weight", "unembedding.weight"),
}
BLOCK_NAMES = {  # after blocks.N., model.layers.N. and block.N.; Hugging Face splits qkv in three
    "attention_norm.weight": ("input_layernorm.weight", "attn.norm.scale"),
    "attention.qkv.weight": ("self_attn.qkv_proj.weight", "attn.qkv.weight"),
    "attention.qkv.bias": ("self_attn.qkv_proj.bias", "attn.qkv.bias"),
    "attention.sinks": ("self_attn.sinks", "attn.sinks"),
    "attention.out.weight": ("self_attn.o_proj.weight", "attn.out.weight"),
    "attention.out.bias": ("self_attn.o_proj.bias", "attn.out.bias"),
    "mlp_norm.weight": ("post_attention_layernorm.weight", "mlp.norm.scale"),
    "mlp.router.weight": ("mlp.router.weight", "mlp.gate.weight"),
    "mlp.router.bias": ("mlp.router.bias", "mlp.gate.bias"),
    "mlp.gate_up_weight": ("mlp.experts.gate_up_proj", "mlp.mlp1_weight"),
    "mlp.gate_up_bias": ("mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    "mlp.down_weight": ("mlp.experts.down_proj", "mlp.mlp2_weight"),
    "mlp.down_bias": ("mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
}


class Counterpart(NamedTuple):
    """One of our tensors, and those of another layout that hold the same numbers."""

    name: str
    shape: tuple[int, ...]
    theirs: dict[str, tuple[int, ...]]  # name -> shape
    to_ours: Callable  # a slice of each of theirs -> the same slice of ours
    to_theirs: Callable  # a slice of ours -> a tuple, the same slice of each of theirs
    mxfp4: bool = False  # theirs are blocks and scales


def deinterleave(x, dim=-1):
    """(gate, up, gate, up, …) along `dim`, as theirs -> all gates, then all ups, as ours."""
    dim %= x.dim()
    return torch.cat(x.unflatten(dim, (-1, 2)).unbind(dim + 1), dim)


def interleave(x, dim=-1):
    dim %= x.dim()
    return torch.stack(x.chunk(2, dim), dim + 1).flatten(dim, dim + 1)


def their_name(name, layout):
    column = LAYOUTS.index(layout)
    if name in NAMES:
        return NAMES[name][column]
    _, number, short = name.split(".", 2)
    return f"{('model.layers', 'block')[column]}.{number}.{BLOCK_NAMES[short][column]}"


def counterpart(name, shape, config, layout, mxfp4):
    """The Counterpart of our tensor `name`; mxfp4: the experts' matrices are packed there."""
    their = their_name(name, layout)
    if ".qkv." in name and layout == HUGGING_FACE:
        heads = (config.num_attention_heads, *2 * [config.num_key_value_heads])
        sizes = [config.head_dim * n for n in heads]
        theirs = {their.replace("qkv", letter): (n, *shape[1:]) for letter, n in zip("qkv", sizes)}
        join, split = lambda *qkv: torch.cat(qkv), lambda qkv: qkv.split(sizes)
        return Counterpart(name, shape, theirs, join, split)
    ours, back = torch.Tensor.contiguous, torch.Tensor.contiguous
    if "gate_up" in name:
        ours, back = deinterleave, interleave
    if not (is_matrix(name) and (mxfp4 or layout == OPENAI)):
        return Counterpart(name, shape, {their: shape}, ours, lambda x: (back(x),))
    if not mxfp4:
        theirs = {their: (shape[0], shape[2], shape[1])}
        return Counterpart(name, shape, theirs, lambda x: ours(x.mT), lambda x: (back(x).mT,))

    def unpack(blocks, scales):
        return ours(dequantize_mxfp4(blocks.to(DEVICE), scales.to(DEVICE)).mT)

    def pack(x):
        return quantize_mxfp4(back(x.to(DEVICE)).mT)

    joint = "." if layout == OPENAI else "_"
    theirs = {f"{their}{joint}{part}": form for part, form in packed_shapes(*shape).items()}
    return Counterpart(name, shape, theirs, unpack, pack, mxfp4=True)


def packed_counterparts(name, shape, layout):
    """The Counterparts of our packed matrix `name`: its blocks and its scales."""
    their, joint = their_name(name, layout), "." if layout == OPENAI else "_"
    ours, back = torch.Tensor.contiguous, torch.Tensor.contiguous
    if "gate_up" in name:
        ours, back = functools.partial(deinterleave, dim=1), functools.partial(interleave, dim=1)
    return [
        Counterpart(
            f"{name}_{part}", form, {f"{their}{joint}{part}": form}, ours, lambda x: (back(x),)
        )
        for part, form in packed_shapes(*shape).items()
    ]


def is_matrix(name):
    """Is it an expert matrix? Ours are (E, in, out), others' also (E, out, in) or packed."""
    return name.endswith(("gate_up_weight", "down_weight"))


def counterparts(config, layout, mxfp4, packed=False):
    """The Counterparts of every parameter of the model, in its order. mxfp4: experts are packed
    there; packed: here too."""
    with torch.device("meta"):
        parameters = dict(GPTOSS(config).named_parameters())
    pairs = []
    for name, parameter in parameters.items():
        shape = tuple(parameter.shape)
        if packed and is_matrix(name):
            pairs += packed_counterparts(name, shape, layout)
        else:
            pairs.append(counterpart(name, shape, config, layout, mxfp4))
    return pairs


# --------------------------------------------------------------------------------------------------
# One conversion, either way


class Job(NamedTuple):
    function: Callable  # slices of the sources -> a tuple, slices of the targets
    sources: list  # of Places
    targets: dict  # name -> Place


def slices(places):
    """Slices of the first dimension, the same in all `places`, of about SLICE_BYTES. One slice of
    everything where the places differ in it: those are q, k and v, which are small."""
    length = places[0].shape[0]
    if any(place.shape[0] != length for place in places):
        return [slice(None)]
    step = max(1, SLICE_BYTES // max(entry_bytes(place) for place in places))
    return [slice(i, min(i + step, length)) for i in range(0, length, step)]


def convert(jobs):
    """Run jobs in a few threads, slice by slice, and print the speed. Returns the names of targets
    that hold NaN or infinity."""
    jobs, broken = list(jobs), set()

    def run(work):
        job, entries = work
        results = job.function(*(place[entries] for place in job.sources))
        for (name, place), result in zip(job.targets.items(), results, strict=True):
            assert result.shape[1:] == place.shape[1:]
            assert entries == slice(None) or len(result) == entries.stop - entries.start
            if not finite(name, result):
                broken.add(name)
            place.write(entries.start or 0, result)
            bar.update(entry_bytes(place) * len(result))

    work = [(job, s) for job in jobs for s in slices([*job.sources, *job.targets.values()])]
    targets = [place for job in jobs for place in job.targets.values()]
    total = sum(place.shape[0] * entry_bytes(place) for place in targets)
    began = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=total, unit="B", unit_scale=True) as bar:
        try:
            for _ in pool.map(run, work):  # raises what a slice raised
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.perf_counter() - began
    print(f"{total / 1e9:.3f} GB written in {seconds:.1f} s: {total / 1e9 / seconds:.2f} GB/s")
    return sorted(broken)


def finite(name, tensor):
    """False if there is NaN or infinity in it. A scale of 255 is NaN; blocks have none."""
    if tensor.is_floating_point():
        return tensor.isfinite().all()
    return not (name.endswith("scales") and (tensor == 255).any())


def warn_of(broken):
    if broken:
        print(
            f"warning: {len(broken)} tensors hold NaN or infinite values, and a model with them "
            f"computes nothing else:{listed(broken)}",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------------------
# Import


def fetch(source):
    """`source` if it is a local folder; the folder of its downloaded top-level files if it is a
    name on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise FileNotFoundError(
            f"{source}: no such folder, and no name on the Hub (like openai/gpt-oss-20b) either"
        )
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", *COMPANIONS]
    try:  # a * also matches a slash there: without ignore_patterns other layouts would come along
        return Path(snapshot_download(source, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:  # unknown name, no access, no network
        raise ValueError(
            f"{source}: no such folder here, and the download failed: {error}"
        ) from error


def read_source(folder):
    """(configuration, places, layout, whether the experts are in MXFP4) of a folder to import.
    ValueError if it is not in Hugging Face's or OpenAI's layout."""
    config = GPTOSSConfig.from_json(folder / "config.json")
    given = read_json(folder / "config.json")
    if unread := "model_type" in given and unread_keys(given):
        print(f"note: keys of {folder / 'config.json'} that are not used:{listed(unread)}")
    quantized = given.get("quantization_config")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method not in (None, "mxfp4"):
        raise ValueError(
            f"{folder / 'config.json'}: quant_method is {str(method)[:80]!r}; only weights in "
            "bf16, fp32 or mxfp4 can be converted"
        )
    places, problems = read_places(folder)
    if (layout := layout_of(places)) not in LAYOUTS:
        raise ValueError(
            f"{folder}: neither Hugging Face's names nor OpenAI's, but {min(places)}, …: is it "
            "converted already?"
        )
    check_layers(config, len(places))
    mxfp4 = any(name.endswith(("_blocks", ".blocks")) for name in places)
    expected = {
        name: shape
        for pair in counterparts(config, layout, mxfp4)
        for name, shape in pair.theirs.items()
    }
    check_places(folder, places, problems, expected)
    return config, places, layout, mxfp4


def import_checkpoint(source, out, packed=False):
    """Convert the folder or Hub name `source` into the checkpoint folder `out`. Returns the names
    of tensors that hold NaN or infinity. packed: experts stay in MXFP4. ValueError or OSError, and
    no folder, if the source is broken."""
    refuse_occupied(out)
    folder = fetch(source)
    config, places, layout, mxfp4 = read_source(folder)
    whose = {HUGGING_FACE: "Hugging Face's", OPENAI: "OpenAI's"}[layout]
    print(f"{folder}: {whose} layout, experts in {'MXFP4' if mxfp4 else 'plain floats'}")
    if packed and not mxfp4:
        raise ValueError(f"{folder}: its experts are not in MXFP4: import it without --packed")
    pairs = counterparts(config, layout, mxfp4, packed)

    def dtype(pair):
        stored = functools.reduce(torch.promote_types, (places[name].dtype for name in pair.theirs))
        return torch.bfloat16 if pair.mxfp4 else stored

    with Aside(out) as aside:
        ours = create_shards(aside, {pair.name: (dtype(pair), pair.shape) for pair in pairs})
        broken = convert(
            Job(
                lambda *x, p=p: (p.to_ours(*x),),
                [places[name] for name in p.theirs],
                {p.name: ours[p.name]},
            )
            for p in pairs
        )
        config.to_json(aside / "config.json")
        if layout == HUGGING_FACE:
            shutil.copyfile(folder / "config.json", aside / HF_CONFIG)
        if layout == OPENAI and folder.absolute().name == "original":
            copy_companions(folder.absolute().parent, aside)  # where the Hub has the tokenizer
        copy_companions(folder, aside)
    warn_of(broken)
    return broken


# --------------------------------------------------------------------------------------------------
# Export


def export_checkpoint(run, out, mxfp4=False, dtype=None, tokenizer=None, state=None):
    """Write a checkpoint folder, training run or saved state (`run` and `state`: see
    snapshots.find_exported) for transformers and vLLM. dtype None: each tensor's own. tokenizer: a
    folder with the tokenizer's files, if none or others are known."""
    refuse_occupied(out)
    if tokenizer and not tokenizer.is_dir():
        raise FileNotFoundError(f"--tokenizer {tokenizer}: no such folder")
    folder, config, places, problems, packed, homes, name = find_exported(run, state, mxfp4)
    source = next((home / HF_CONFIG for home in homes if exists(home / HF_CONFIG)), None)
    source = read_json(source) if source else {}
    pairs = counterparts(config, HUGGING_FACE, mxfp4, packed)
    check_places(folder, places, problems, {pair.name: pair.shape for pair in pairs})
    squares = []  # of the error and of the weights, of each slice that is quantized

    def to_theirs(pair, weight):
        theirs = pair.to_theirs(weight)
        if pair.mxfp4:
            error = pair.to_ours(*theirs).float() - weight.to(DEVICE).float()
            squares.append([x.float().norm().item() ** 2 for x in (error, weight)])
        return theirs

    def stored(pair):
        own = torch.uint8 if pair.mxfp4 else places[pair.name].dtype
        return dtype if dtype and own.is_floating_point else own

    with Aside(out) as aside:
        theirs = create_shards(
            aside,
            {name: (stored(p), shape) for p in pairs for name, shape in p.theirs.items()},
        )
        broken = convert(
            Job(
                functools.partial(to_theirs, p),
                [places[p.name]],
                {name: theirs[name] for name in p.theirs},
            )
            for p in pairs
        )
        if packed:
            print("MXFP4 experts: blocks and scales as they were stored")
        elif mxfp4:
            error, weights = map(sum, zip(*squares))
            relative = math.sqrt(error / weights) if weights else 0.0
            print(f"MXFP4 experts: relative error {relative:.3e}")
        given = hf_config(config, dtype or places["norm.weight"].dtype, mxfp4, source)
        (aside / "config.json").write_text(json.dumps(given, indent=2) + "\n")
        known = [home for home in homes if exists(home / TOKENIZER)] + list(filter(exists, homes))
        for files in filter(None, (*known[:1], tokenizer)):
            copy_companions(files, aside)
        write_generation_config(aside, config, name)
    warn_of(broken)
    fixed = note_what_vllm_fixes(config)
    if broken:
        return
    if lacking := lacks_tokenizer(out, config, name):
        print(
            f"{out} has the weights but {lacking}: export again with --tokenizer DIR, or copy its "
            "files there"
        )
    else:
        print(f"{out} is ready for transformers{'' if fixed else ' and vLLM'}")


def lacks_tokenizer(folder, config, name):
    """Why transformers and vLLM cannot use the model in `folder` with text, or None."""
    if not exists(folder / TOKENIZER):
        return f"no tokenizer{f' ({name})' if name else ''}"
    try:
        given = read_json(folder / TOKENIZER)
        added = [token["id"] for token in given.get("added_tokens") or ()]
        tokens = max(len(given["model"]["vocab"]), *(number + 1 for number in added), 0)
    except (ValueError, KeyError, TypeError) as error:
        return f"a {TOKENIZER} that cannot be read ({error!r:.100})"
    if tokens > config.vocab_size:
        return f"a tokenizer of {tokens:,} tokens for a vocabulary of {config.vocab_size:,}"
    return None


def write_generation_config(folder, config, name):
    """Let generation_config.json name every token that ends an answer by the tokenizer `name`, or
    by the released one where none was recorded and the vocabulary is as large. What it says
    already stays."""
    path = folder / "generation_config.json"
    if name is None and config.vocab_size >= HarmonyTokenizer.vocab_size:
        name = HarmonyTokenizer.name
    given = read_json(path) if exists(path) else {}
    ends = given.get("eos_token_id") or []
    ends = ends if isinstance(ends, list) else [ends]
    if name in TOKENIZERS and (missing := [t for t in TOKENIZERS[name].stop if t not in ends]):
        tokens = {"bos_token_id": 199_998} if name == HarmonyTokenizer.name else {}
        tokens |= {"pad_token_id": TOKENIZERS[name].end}
        given = tokens | given | {"eos_token_id": ends + missing}
        path.write_text(json.dumps(given, indent=2) + "\n")


def note_what_vllm_fixes(config):
    """Print what vLLM has as constants and computes otherwise. True if there is something."""
    positions = int(config.initial_context_length * config.rope_scaling_factor)  # in vLLM's table
    constants = {
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "max_position_embeddings": min(positions, config.max_position_embeddings),
    }
    others = {name: value for name, value in constants.items() if getattr(config, name) != value}
    for name, value in others.items():
        print(f"note: {name} is {getattr(config, name)}; vLLM 0.32 computes as if it were {value}")
    return bool(others)


# --------------------------------------------------------------------------------------------------
# Verification


@torch.no_grad()
def verify(source, folder):
    """Compare logprobs of the checkpoint `folder` with transformers' of its `source`. ValueError
    unless they agree.

    A comparison that cannot fail proves nothing: with gates and ups exchanged, a mistake that no
    shape reveals, ours must differ. In fp32 if the model fits, and then no token may differ.
    Otherwise in bf16, where rounding sends some tokens to other experts: there the median token is
    judged."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer, Mxfp4Config
    except ImportError as error:
        raise ValueError("--verify compares with transformers: pip install transformers") from error
    source, config = fetch(source), GPTOSSConfig.from_json(folder / "config.json")
    parameters = sum(math.prod(place.shape) for place in lora.places(folder)[0].values())
    exact = 4 * parameters < 0.8 * free_memory(torch.device(DEVICE))
    dtype, tolerance, judged = torch.bfloat16, 0.5, torch.median
    if exact:
        dtype, tolerance, judged = torch.float32, 1e-3, torch.max

    prompt = __doc__  # longer than the sliding window
    if exists(source / "tokenizer.json"):
        ids = AutoTokenizer.from_pretrained(source)(prompt)["input_ids"]
    else:
        ids = [byte % config.vocab_size for byte in prompt.encode()]
    tokens = torch.tensor([ids[: min(256, config.max_position_embeddings)]], device=DEVICE)

    quantized = "quantization_config" in read_json(source / "config.json")
    options = {"quantization_config": Mxfp4Config(dequantize=True)} if quantized else {}
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options).to(DEVICE, dtype)
    expected = theirs(tokens).logits.float().log_softmax(-1)
    del theirs
    ours = GPTOSS.from_checkpoint(folder, DEVICE, dtype)

    def difference():  # per token, the largest over the vocabulary
        return (ours(tokens).float().log_softmax(-1) - expected).abs().amax(-1)

    found = difference()
    for block in ours.blocks:
        matrix = block.mlp.gate_up_weight
        matrix.copy_(matrix.roll(config.intermediate_size, dims=-1))
    control = difference()
    print(
        f"{len(tokens[0])} tokens in {str(dtype).removeprefix('torch.')}, largest difference of a "
        f"logprob from transformers': {found.max():.2e}, and {found.median():.2e} for the median "
        f"token\nwith gates and ups exchanged: {control.max():.2e} and {control.median():.2e}"
    )
    if not judged(found) < min(tolerance, judged(control) / 10):
        fix = "convert it again"
        if not exact:
            fix += (
                f", or verify it in fp32, with {5 * parameters / 1e9:.0f} GB of memory free: bf16 "
                "may be too coarse to tell"
            )
        raise ValueError(f"{folder} does not compute what {source} does: {fix}")


# --------------------------------------------------------------------------------------------------


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", nargs="?", help="what to import: a name on the Hub, or a folder")
    add("--out", type=Path, help="the new folder (import: checkpoints/ and the source's last part)")
    add("--packed", action="store_true", help="keep the experts of an import in MXFP4")
    add("--verify", action="store_true", help="convert if need be, then compare with transformers")
    add("--export", type=Path, metavar="RUN", help="export a run, a saved state or a checkpoint")
    add("--state", help="of the run to export: best, last, or a number of steps")
    add("--mxfp4", action="store_true", help="export experts in MXFP4")
    add("--adapter", action="store_true", help="export a run's adapters alone, as PEFT keeps them")
    add("--base", metavar="NAME", help="with --adapter: the model they are for, as on the Hub")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of an export's tensors (default: as they are stored)",
    )
    add("--tokenizer", type=Path, metavar="DIR", help="an export's tokenizer files, if not in RUN")
    options = parser.parse_args(arguments)
    if (options.source is None) == (options.export is None):
        parser.error("give either a source to import or --export RUN")
    if options.export and (options.verify or options.packed or not options.out):
        parser.error("--export needs --out DIR, and has no --verify and no --packed")
    merged = options.mxfp4 or options.dtype or options.tokenizer
    if options.source and (merged or options.adapter or options.state):
        parser.error("--mxfp4, --dtype, --tokenizer, --state and --adapter belong to --export")
    if options.base is not None and not (options.adapter and options.base):
        parser.error("--base names the model that an export with --adapter is for")
    if options.adapter and (merged or options.state):
        parser.error(
            "--adapter writes a finished run's adapters as they are: "
            "leave --mxfp4, --dtype, --tokenizer and --state out"
        )
    try:
        if options.adapter:
            base = lora.write_peft(find_model(options.export).weights, options.out, options.base)
            unnamed = "the base, which it does not name: for AutoPeftModelForCausalLM give --base"
            print(f"{options.out} is ready for PEFT, on transformers' model of {base or unnamed}")
            return
        if options.export:
            dtype = getattr(torch, options.dtype) if options.dtype else None
            how = options.mxfp4, dtype, options.tokenizer, options.state
            export_checkpoint(options.export, options.out, *how)
            return
        name = Path(options.source).resolve().name + ("-packed" if options.packed else "")
        out = options.out or Path("checkpoints") / name
        if not (options.verify and exists(out / "config.json")):
            broken = import_checkpoint(options.source, out, options.packed)
            print(f"{out} is {'converted, as broken as its source' if broken else 'ready'}")
        if options.verify:
            verify(options.source, out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
