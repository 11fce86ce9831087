"""What a measurement prints, and the JSON that it keeps. A row here is a row of a printed table."""

import argparse
import datetime
import json
import os
import re

import torch

from bench.common import DEVICE, DTYPE, GIB, GPU, K


def say(text=""):
    """Print on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def say_row(columns, row=None):
    """Print a row of a table, or its head. columns: (title, key in the row, format: < or >, a
    width, how to write it)."""
    line = ""
    for title, key, form in columns:
        value = title if row is None else row.get(key)
        words = {None: "-", True: "yes", False: "no"}
        if value is None or isinstance(value, bool):
            value = words[value]
        line += format(value, re.match(r"[<>]\d+", form)[0] if isinstance(value, str) else form)
    say(line + (f"  {row['error']}" if row and "error" in row else ""))


class Results(dict):
    """What is known so far, also in the JSON file `path` at any time: a run that is stopped leaves
    it."""

    def __init__(self, path, **values):
        super().__init__(values)
        self.path, self.writes = path, os.environ.get("RANK", "0") == "0"
        self.save()

    def save(self, **values):
        self.update(values)
        if self.writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            aside = self.path.with_name(f".{self.path.name}.partial")
            aside.write_text(json.dumps(self, indent=2) + "\n")
            aside.rename(self.path)

    def add(self, key, row):
        self[key].append(row)
        self.save()


def length(tokens):
    """4096 -> '4K'"""
    units = (K * K, "M"), (K, "K"), (1, "")
    return next(f"{tokens // size}{unit}" for size, unit in units if tokens % size == 0)


def parse_rows(text):
    """'16x4K,100' -> [(16, 4096), (1, 100)], numbers of sequences and their length"""
    units = {"": 1, "K": K, "M": K * K}
    pattern = r"(?:([1-9]\d*)X)?([1-9]\d*)([KM]?)"
    parts = [re.fullmatch(pattern, part.strip().upper()) for part in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of lengths such as 8K or 4096,16x4K")
    return [(int(part[1] or 1), int(part[2]) * units[part[3]]) for part in parts]


def parse_ranks(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of ranks: 1 or more")
    return int(text)


def parse_documents(text):
    """'512,mix' -> [512, 'mix'], lengths of documents of at least 4 tokens"""
    parts = [part.strip() for part in text.lower().split(",")]
    if not all(part == "mix" or (part.isdecimal() and int(part) >= 4) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 512,4096,mix")
    return [part if part == "mix" else int(part) for part in parts]


def machine():
    """What a figure depends on besides the code: device, versions, dtype, date."""
    gpu = torch.cuda.get_device_properties(DEVICE) if GPU else None
    return {
        "device": f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" if gpu else "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
