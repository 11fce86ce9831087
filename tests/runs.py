"""Tiny runs of train.py for the tests and for soak.py, and other commands, in processes that start
in no time.

A run's ranks are forked from a server that has imported train.py. They are looked after as torchrun
looks after them: the same environment variables, the same store that outlives them, and when one
fails the others are told to end, then made to.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist

from common import PRELOADED
from conftest import ROOT

# of runs: one that is to be interrupted, and conftest.base
ENDLESS = ("tiny.py", "--steps=100000", "--warmup_steps=5")
BASE = ("tiny.py", "--steps=12", "--save_every=4", "--keep=3")

# for processes that are started by hand
NO_GPU = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

TINY = """
vocab_size = 257
num_hidden_layers, hidden_size, intermediate_size = 2, 32, 16
num_attention_heads, num_key_value_heads, head_dim = 4, 2, 8
num_experts, experts_per_token = 4, 2
sliding_window, initial_context_length, max_position_embeddings = 8, 16, 64
seq_len, batch_size, micro_batch, recompute = 32, 4, 2, "none"
steps, lr, warmup_steps = 12, 3e-3, 3
data, eval_data = "corpus", "held-out"
"""


def write_corpus(folder, documents=300, seed=0, counted=0.75):
    """A corpus of bytes in which each document repeats a short word; the share `counted` of the
    tokens counts as a target."""
    random = np.random.default_rng(seed)
    words = [random.integers(97, 123, random.integers(2, 6)) for _ in range(documents)]
    texts = [np.append(np.resize(word, random.integers(5, 70)), 256) for word in words]
    tokens, ends = np.concatenate(texts), np.cumsum([0, *map(len, texts)])
    folder.mkdir(parents=True)
    tokens.astype("<u4").tofile(folder / "tokens.bin")
    ends.astype("<u8").tofile(folder / "documents.bin")
    (random.random(len(tokens)) < counted).astype("u1").tofile(folder / "counted.bin")
    meta = {"tokenizer": "bytes", "vocab_size": 257, "documents": documents, "counted": 0}
    (folder / "meta.json").write_text(json.dumps(meta | {"tokens": len(tokens)}))
    return folder


def make_home(folder):
    """A folder to run in: tiny.py and its corpora."""
    write_corpus(folder / "corpus")
    write_corpus(folder / "held-out", documents=9, seed=1)
    (folder / "tiny.py").write_text(TINY)
    return folder


class Run:
    """`train.py *arguments` on some ranks, in the folder `home`, started at once."""

    def __init__(self, home, *arguments, ranks=1, prepare=None, program="train"):
        """prepare(rank): called on each rank before it begins. program: another module than train
        with a main()."""
        self.home, self.output = home, home / f"output-{os.urandom(4).hex()}"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        patience = timedelta(seconds=60)
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience
        )
        shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": self.store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        shared |= {"OMP_NUM_THREADS": 1, "CUDA_VISIBLE_DEVICES": ""}
        self.processes = []
        for rank in range(ranks):
            variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
            inputs = home, self.output, variables, program, arguments, prepare
            task = context.Process(target=_rank, args=inputs, daemon=True)
            task.start()
            self.processes.append(task)

    def kill(self, number=signal.SIGKILL, ranks=None):
        for process in self.processes if ranks is None else [self.processes[r] for r in ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def text(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, pattern, timeout=120):
        """Wait until the run has printed something that matches `pattern`."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.text()):
            alive = any(p.is_alive() for p in self.processes)
            assert time.monotonic() < deadline and alive, self.text()
            time.sleep(0.01)
        return self

    def wait_for_step(self, step):
        return self.wait_for(rf"step +{step} \|")

    def wait(self, timeout=240, grace=30):
        """The exit codes of all ranks. When one has failed the others get SIGTERM and, `grace`
        seconds later, SIGKILL."""
        deadline, warned = time.monotonic() + timeout, None
        while any(p.is_alive() for p in self.processes):
            failed = any(p.exitcode not in (None, 0) for p in self.processes)
            if failed and not warned:
                self.kill(signal.SIGTERM)
                warned = time.monotonic()
            if (warned and time.monotonic() > warned + grace) or time.monotonic() > deadline:
                self.kill()
            time.sleep(0.02)
        assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.text()}"
        return [p.exitcode for p in self.processes]

    def ends_well(self):
        codes = self.wait()
        assert not any(codes), f"exit codes {codes}:\n{self.text()}"
        return self


def _rank(home, output, variables, program, arguments, prepare):
    os.chdir(home)
    os.environ |= {name: str(value) for name, value in variables.items()}
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.argv = [f"{program}.py", *arguments]
    module = importlib.import_module(program)
    if prepare:
        prepare(variables["RANK"])
    module.main()


def command(program, *arguments, input=b"", encoding="utf-8"):
    """What `python program.py arguments` does, from the repository's folder: its exit code, and the
    bytes it writes to stdout and to stderr. `input`: its stdin; `encoding`: its terminal's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdin", "stdout", "stderr")]
        streams[0].write_bytes(input)
        line = [str(argument) for argument in arguments]
        task = context.Process(
            target=_program, args=(streams, program, line, encoding), daemon=True
        )
        task.start()
        task.join(120)
        task.kill()
        return Done(task.exitcode, *(path.read_bytes() for path in streams[1:]))


Done = namedtuple("Done", "returncode stdout stderr")


def _program(streams, program, arguments, encoding):
    os.chdir(ROOT)
    os.environ |= NO_GPU
    for number, path in enumerate(streams):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, closefd=False)  # multiprocessing has closed it  # noqa: SIM115
    sys.stdout.reconfigure(encoding=encoding)
    sys.argv = [f"{program}.py", *arguments]
    importlib.import_module(program).main()


def train(home, *arguments, ranks=1, prepare=None):
    """Run train.py to its good end. Returns what it printed."""
    return Run(home, *arguments, ranks=ranks, prepare=prepare).ends_well().text()


def logged(home, name):
    """The lines of a run's metrics.jsonl."""
    lines = (Path(home) / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def metrics(home, name):
    """Those that belong to steps."""
    return [row for row in logged(home, name) if "loss" in row]


def losses(home, name):
    """The loss of each step; no step may be missing or come twice."""
    rows = metrics(home, name)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]


def held_out(home, name):
    """{step: held-out loss}"""
    return {row["step"]: row["eval_loss"] for row in logged(home, name) if "eval_loss" in row}


def states(home, name):
    """Names of all that is in a run's states/, hidden files too."""
    return sorted(path.name for path in (Path(home) / "runs" / name / "states").iterdir())


def copy_run(home, name, copy, step):
    """A copy of a run as it was when the state after `step` steps was its newest."""
    run = Path(home) / "runs" / copy
    shutil.copytree(Path(home) / "runs" / name, run)
    for state in (run / "states").iterdir():
        if int(state.name[-8:]) > step:
            shutil.rmtree(state)
    shutil.rmtree(run / "model")
    return run
