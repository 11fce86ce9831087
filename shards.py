"""Safetensors files with an index, read and written by place.

A file is 8 bytes with the length of a header, the header (JSON: name -> dtype, shape, place) and
the tensors. The library checks the header. It is not used for the tensors: it reads through a
memory map, where a file that is cut short meanwhile kills the process, and writes whole tensors
only. By place, a few megabytes at a time, a folder of any size needs little host memory, several
threads may read and write, and every read is compared with what the header promises.

Reference: https://github.com/huggingface/safetensors
"""

import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from folders import exists

INDEX, SHARD_BYTES = "model.safetensors.index.json", 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES["U8"] = torch.uint8
CODES = {dtype: code for code, dtype in DTYPES.items()}


def listed(problems):
    """The end of a message: one problem, or up to ten, one a line, and how many more there are."""
    if len(problems) == 1:
        return f" {problems[0]}"
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "".join(f"\n  {problem}" for problem in [*problems[:10], *more])


def read_json(path):
    """The JSON object in `path`. ValueError if it holds anything else, or cannot be read."""
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable {Path(path).name} ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(given).__name__}")
    return given


def entry_bytes(tensor):
    """Bytes of one entry of the first dimension, of a tensor or a Place."""
    return math.prod(tensor.shape[1:]) * tensor.dtype.itemsize


@dataclass(frozen=True)
class Place:
    """Where a tensor lies. `place[start:stop]` reads these entries of its first dimension."""

    path: Path
    offset: int  # of its first byte in the file
    dtype: torch.dtype  # or its name in the header, if it is none of DTYPES
    shape: tuple[int, ...]
    file_bytes: int  # the file's size when its header was read

    def __getitem__(self, entries):
        start, stop, _ = entries.indices(self.shape[0])
        data = torch.empty(max(stop - start, 0) * entry_bytes(self), dtype=torch.uint8)
        view, done = memoryview(data.numpy()), 0
        try:
            with open(self.path, "rb", buffering=0) as file:
                found = os.fstat(file.fileno()).st_size
                file.seek(self.offset + start * entry_bytes(self))
                while done < len(view) and (count := file.readinto(view[done:])):
                    done += count
        except OSError as error:
            raise OSError(f"cannot read {self.path}: {error.strerror or error}") from None
        if found != self.file_bytes or done < len(view):
            raise OSError(
                f"{self.path} had {self.file_bytes} bytes and now has {found}, of which {done} "
                f"could be read where {len(view)} were asked for: copy or download it again"
            )
        return data.view(self.dtype).view(max(stop - start, 0), *self.shape[1:])

    def write(self, start, tensor):
        """Write entries from number `start` on."""
        data = tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy()
        try:
            with open(self.path, "r+b") as file:
                file.seek(self.offset + start * entry_bytes(self))
                file.write(memoryview(data).cast("B"))
        except OSError as error:
            free = shutil.disk_usage(self.path.parent).free
            raise OSError(
                f"cannot write {self.path}, with {free / 1e9:.1f} GB free on its disk: "
                f"{error.strerror or error}"
            ) from None


def read_header(path):
    """{name: Place} of a safetensors file, whose header and length the library has checked."""
    with safe_open(path, "pt"), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(
            path,
            8 + length + x["data_offsets"][0],
            DTYPES.get(x["dtype"], x["dtype"]),
            tuple(x["shape"]),
            size,
        )
        for name, x in header.items()
    }


def weight_files(folder):
    """{tensor's name: path of the file in `folder` that the index names}. ValueError for an index
    that is not one."""
    path = Path(folder) / INDEX
    try:
        weight_map = read_json(path)["weight_map"]
        for file in weight_map.values():
            if Path(file).name != file or file in ("", ".."):
                raise ValueError("a file name in it leads out of the folder")
        return {name: path.with_name(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a readable index of a checkpoint ({error}); convert_hf.py makes one"
        ) from None


def read_places(folder):
    """({name: Place}, problems) of the tensors in a folder; None for the place of a tensor that
    the index names and its file does not have, or that is in a file which cannot be read."""
    folder = Path(folder)
    index = weight_files(folder) if exists(folder / INDEX) else None
    if index is None:
        paths = [folder / name for name in os.listdir(folder) if name.endswith(".safetensors")]
    else:
        paths = index.values()
    places, problems, unreadable = {}, [], set()
    for path in sorted(set(paths)):
        try:
            found = read_header(path)
        except Exception as error:  # the library has an exception for each way to be wrong
            problems.append(
                f"{path.name} is unreadable: missing, truncated or no safetensors file ({error})"
            )
            unreadable.add(path)
            continue
        problems += [
            f"{name} is in {path.name} and in {places[name].path.name}"
            for name in found.keys() & places.keys()
        ]
        places |= found
    if not places:
        end = f":{listed(problems)}" if problems else ""
        raise ValueError(f"{folder}: no tensors in safetensors files here{end}")
    if index is not None:
        unlisted = places.keys() - index.keys()
        problems += [
            f"{name} is in {places[name].path.name}, not in the index" for name in unlisted
        ]
        for name, path in index.items():
            if name not in places:
                places[name] = None
                if path not in unreadable:
                    problems.append(f"{name} is in the index, not in {path.name}")
        places = {name: place for name, place in places.items() if name in index}
    return places, problems


def check_places(folder, places, problems, expected):
    """ValueError with every problem: of the files, and where `places` are not the expected
    {name: shape}. A name that ends in blocks or scales holds uint8, any other floats."""
    problems = problems + [
        f"missing: {name} {tuple(shape)}" for name, shape in expected.items() if name not in places
    ]
    for name, place in places.items():
        if name not in expected:
            problems.append(f"unknown: {name}{f' {place.shape}' if place else ''}")
        elif place is None:
            continue
        elif place.shape != tuple(expected[name]):
            problems.append(f"{name} has shape {place.shape}, the model's is {expected[name]}")
        elif place.dtype not in CODES or name.endswith(("blocks", "scales")) != (
            place.dtype == torch.uint8
        ):
            kind = CODES.get(place.dtype, place.dtype)
            problems.append(f"{name} has dtype {kind}, which is no weight's")
    if problems:
        raise ValueError(
            f"{folder} does not fit the model, {len(problems)} problems:{listed(problems)}"
        )


def create_shards(folder, tensors):
    """Make files of about SHARD_BYTES with room for tensors {name: (dtype, shape)}, and their
    index. Returns {name: Place}, to be written."""
    nbytes = {name: math.prod(shape) * dtype.itemsize for name, (dtype, shape) in tensors.items()}
    shards, filled = [[]], 0
    for name, size in nbytes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places = {}
    for number, names in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names, key=lambda name: -tensors[name][0].itemsize):  # so all align
            dtype, shape = tensors[name]
            offsets = [end, end + nbytes[name]]
            header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": offsets}
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
