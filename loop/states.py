"""The saved states of a training run.

A state is what the ranks hold, one file per rank, written by torch.distributed.checkpoint, which
hands it back to any number of ranks. state.json beside the files has the plain numbers, and the
size and checksum of every file.
"""

import dataclasses
import json
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from weights import first_rank, publish


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps done
    updates: int = 0  # of which updated the weights
    skipped: int = 0  # updates skipped in a row until now


# what may not change when a run goes on, beside the model's sizes and the data
FIXED = ("data", "seed", "seq_len", "batch_size", "long_documents", "optimizer")


def identity(options, config, data):
    """What makes a run this run: a state of one is not continued by another."""
    same = {name: getattr(options, name) for name in FIXED}
    return dataclasses.asdict(config) | same | {"tokens in data": data.tokens}


def trained(model):
    """{name: parameter} of the parameters that require a gradient."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fill_state(optimizer):
    """Let an optimizer that makes its state in the first step make it now, so that a saved state
    has somewhere to go: a step with gradients and learning rates of zero changes no weight."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0 * group["lr"]
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    count_updates(optimizer, 0)


def count_updates(optimizer, updates):
    """Tell an optimizer that counts them, for each parameter as Adam does, how many came before."""
    for state in optimizer.state.values():
        if torch.is_tensor(count := state.get("step")):
            count.fill_(updates)


def training_state(model, optimizer):
    """{name: tensor} of all that a resumed run needs: trained parameters, the optimizer's state."""
    tensors = {name: p.detach() for name, p in trained(model).items()}
    for name, p in trained(model).items():
        for key, value in optimizer.state[p].items():
            if torch.is_tensor(value) and key != "step":
                tensors[f"{key}.{name}"] = value
    return tensors


class States:
    """The saved states of a run: folders step-00000100 in `folder`, of which the last `keep` stay.

    save() copies the tensors to host memory and returns; a thread writes them while training goes
    on. What goes wrong on one rank is an OSError on all."""

    def __init__(self, folder, keep, model, optimizer, identity):
        self.folder, self.keep, self.identity = Path(folder), keep, identity
        self.optimizer, self.tensors = optimizer, training_state(model, optimizer)
        self.pending = None
        # The thread's own group, because its messages must not mix with the loop's; and a patient
        # one, because the first rank reads checksums.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self.thread = ThreadPoolExecutor(1)
        if first_rank():
            for left in self.folder.glob(".step-*"):  # by a run that was killed while it saved
                shutil.rmtree(left)

    def complete(self):
        """The folders of complete states, the oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []

    def save(self, at):
        """Save the state after `at.step` steps. Returns the seconds for which training waited.
        OSError if its folder cannot be made, or if the previous state could not be written."""
        self.wait()
        start, folder = time.perf_counter(), self.folder / f"step-{at.step:08d}"
        aside, failure = folder.with_name(f".{folder.name}.partial"), None
        if first_rank():
            try:
                aside.mkdir(parents=True)
            except OSError as error:
                failure = f"cannot save {folder}: {error}"
        self.agree(failure)  # and no rank writes before the folder is there
        writer = dcp.HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        written = dcp.async_save(self.tensors, storage_writer=writer, process_group=self.group)
        numbers = dataclasses.asdict(at) | {"identity": self.identity}
        self.pending = self.thread.submit(self._publish, written, aside, folder, numbers)
        return time.perf_counter() - start

    def _publish(self, written, aside, folder, numbers):
        """Make a state visible once all ranks have written it. Returns what went wrong, or None."""
        try:
            written.result()
            if first_rank():
                files = sorted(aside.glob("*.safetensors"))
                with ThreadPoolExecutor() as pool:
                    prints = pool.map(fingerprint, files)
                    numbers["files"] = dict(zip((file.name for file in files), prints))
                (aside / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")
                publish(aside, folder)
                for old in self.complete()[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, dcp.CheckpointException) as error:
            if first_rank():
                shutil.rmtree(aside, ignore_errors=True)
            failures = getattr(error, "failures", {}).items()
            causes = {str(cause): rank for rank, (cause, _) in failures}
            reason = "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items()) or error
            return f"cannot save {folder}: {reason}"

    def wait(self):
        """Wait until the state that is being written, if any, is complete. OSError if it could not
        be written."""
        if self.pending:
            failure, self.pending = self.pending.result(), None
            self.agree(failure)

    def agree(self, failure):
        """OSError on all ranks if there is a failure on the first one."""
        told = [failure]
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[0]:
            raise OSError(told[0])

    def resume(self):
        """Fill the model and the optimizer from the newest undamaged state. Returns its Progress;
        None if there is no state. ValueError if all are damaged, or of another run."""
        numbers = [self._newest() if first_rank() else None]
        dist.broadcast_object_list(numbers, src=0, group=self.group)
        (numbers,) = numbers
        if isinstance(numbers, str):
            raise ValueError(numbers)
        if numbers is None:
            return None
        check_same_run(self.folder.parent, numbers["identity"], self.identity)
        at = Progress(**{f.name: numbers.get(f.name, 0) for f in dataclasses.fields(Progress)})
        reader = dcp.HuggingFaceStorageReader(str(self.folder / f"step-{at.step:08d}"))
        dcp.load(self.tensors, storage_reader=reader, process_group=self.group)
        count_updates(self.optimizer, at.updates)
        return at

    def _newest(self):
        """The numbers of the newest undamaged state, what is wrong if all are damaged, or None."""
        damaged = []
        for folder in reversed(self.complete()):
            numbers, damage = examine(folder)
            if numbers:
                return numbers
            damaged.append(f"{folder.name} ({damage})")
            warning = f"warning: the state {folder} is damaged ({damage}): trying the one before it"
            print(warning, flush=True)
        if damaged:
            listed = ", ".join(damaged)
            fix = "remove the folder to begin again"
            return f"{self.folder}: all states are damaged, {listed}: {fix}"
        return None


def check_same_run(folder, was, now):
    """ValueError if the run in `folder`, whose state has the identity `was`, cannot go on as one
    with the identity `now`."""
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    if names:
        changed = ", ".join(f"{n} was {was.get(n)!r} and is {now.get(n)!r}" for n in names)
        raise ValueError(
            f"{folder} cannot go on with other settings: {changed}; --name=... starts another run"
        )


def fingerprint(path):
    """[size in bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def examine(folder):
    """(the numbers of a saved state, or None if it is damaged; what is damaged, or None)"""
    try:
        numbers = json.loads((folder / "state.json").read_text())
        kinds = {key: type(numbers[key]) for key in ("step", "updates", "identity", "files")}
        if list(kinds.values()) != [int, int, dict, dict]:
            return None, "state.json is not what train.py writes"
        if folder.name != f"step-{numbers['step']:08d}":
            return None, f"state.json is of step {numbers['step']}"
        files = numbers["files"]
        if sorted(files) != sorted(path.name for path in folder.glob("*.safetensors")):
            return None, "files are missing, or are too many"
        with ThreadPoolExecutor() as pool:
            found = dict(zip(files, pool.map(lambda name: fingerprint(folder / name), files)))
        if wrong := [name for name in files if found[name] != files[name]]:
            return None, f"{', '.join(wrong)} has another size or checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, repr(error)
    return numbers, None
