"""The saved states of a training run.

A state is a folder, step-00000100 for the state after 100 steps: what the ranks hold, each in files
of its own, written by torch.distributed.checkpoint, which hands it back to any number of ranks; and
state.json, with the plain numbers and the size and checksum of every file.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

from folders import Aside, exists, sweep, sync
from weights import first_rank

SECONDS_TO_CHECK = 1800  # for which ranks wait while the first one reads checksums

# Bytes in a file of a state, or one tensor if it is larger. A file is built in host memory, twice
# over, before it is written: a single file per rank took as much as two more states. Meanwhile no
# other thread of Python runs, neither the loop nor the pulse, for a second or more per GiB.
FILE_BYTES = 2**28


@dataclasses.dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # steps done
    updates: int = 0  # of which updated the weights
    skipped: int = 0  # updates skipped in a row until now
    best: float | None = None  # lowest held-out loss until now, nats per token
    waited: int = 0  # evaluations since then

    def ended(self, options):
        """Whether the run has done its steps, or waited long enough for a better evaluation."""
        return self.step >= options.steps or 0 < options.stop_after <= self.waited

    def due(self, every, last):
        """Whether something done every `every` steps, and in the last one, is due; 0: never."""
        return every > 0 and (self.step % every == 0 or last)

    def judge(self, loss):
        """Count an evaluation. True if it is the best so far."""
        better = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.best, self.waited = (loss, 0) if better else (self.best, self.waited + 1)
        return better


# --------------------------------------------------------------------------------------------------
# What a state holds


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


def numbers_of_files(tensors):
    """{name: the number of its file, from 1} of {name: tensor}: in order, FILE_BYTES of what this
    rank holds to a file."""
    numbers, number, size = {}, 1, 0
    for name, tensor in tensors.items():
        held = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        if size and size + held > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name], size = number, size + held
    return numbers


# --------------------------------------------------------------------------------------------------
# Which run a state belongs to


def identity(options, config, data):
    """What makes a run this run: a state of one is not continued by another."""
    same = {name: getattr(options, name) for name in ("seed", "seq_len", "batch_size", "optimizer")}
    corpus = {"data": options.data, "tokens in data": data.tokens}
    corpus["content of data"] = data.identity
    return dataclasses.asdict(config) | same | corpus


def check_same_run(folder, was, now):
    """ValueError if the run in `folder`, whose state has the identity `was`, cannot continue as one
    with the identity `now`. Either may lack what its version did not know."""
    if was.get("long_documents", "cut") != "cut":
        raise ValueError(f"{folder} dropped long documents, which is gone: --name=... starts anew")
    names = [name for name in now if name in was and was[name] != now[name]]
    if "content of data" in was and "content of data" not in names:
        names = [name for name in names if name != "data"]  # the same corpus elsewhere
    if names:
        changed = ", ".join(f"{n} was {was[n]!r} and is {now[n]!r}" for n in names)
        raise ValueError(
            f"{folder} cannot continue with other settings: {changed}; --name=... starts another"
        )


# --------------------------------------------------------------------------------------------------
# Saving, finding and loading states


def saved_states(folder):
    """{step: folder} of the states in `folder`, the newest first. What else lies there, such as
    step-00000100.backup, is not a state. OSError if the folder is there but cannot be read."""
    if not exists(folder):
        return {}
    names = [re.fullmatch(r"step-(\d{8,})", name) for name in os.listdir(folder)]
    steps = sorted((int(match[1]) for match in names if match), reverse=True)
    return {step: state_folder(folder, step) for step in steps}


def state_folder(folder, step):
    return Path(folder) / f"step-{step:08d}"


class States:
    """The states of a run in `folder`. The `keep` newest undamaged ones stay, and, with keep_best,
    the one with the lowest held-out loss.

    save() copies the tensors to host memory and returns; a thread writes them while training goes
    on. What goes wrong on one rank is an OSError on all."""

    def __init__(self, folder, options, identity):
        self.folder, self.options, self.identity = Path(folder), options, identity
        # step of the last state, and of the last one on the disk; what is being written
        self.saved, self.written, self.pending = None, None, []
        self.good, self.held_out = set(), {}  # steps known to be undamaged; {step: held-out loss}
        # The thread's own group, because its messages must not mix with the loop's.
        patience = timedelta(seconds=SECONDS_TO_CHECK)
        self.group = dist.new_group(backend="gloo", timeout=patience)
        self.thread = ThreadPoolExecutor(1)

    def from_first(self, function):
        """What function() returns on the first rank; its ValueError or OSError, on all ranks."""
        told = [None, None]
        if first_rank():
            try:
                told[0] = function()
            except ValueError as error:
                told[1] = ValueError(str(error))
            except OSError as error:
                told[1] = OSError(str(error))
        dist.broadcast_object_list(told, src=0, group=self.group)
        answer, failure = told
        if failure:
            raise failure
        return answer

    # ---- finding

    def newest(self):
        """The Progress of the newest undamaged state, or of a new run if there is no state.
        ValueError if all are damaged, or of another run. OSError if they cannot be read."""
        numbers = self.from_first(self._newest)
        if numbers is None:
            return Progress()
        check_same_run(self.folder.parent, numbers["identity"], self.identity)
        names = {f.name for f in dataclasses.fields(Progress)}
        self.saved = self.written = numbers["step"]
        return Progress(**{name: value for name, value in numbers.items() if name in names})

    def _newest(self):
        """The numbers of the newest undamaged state; None if there is no state."""
        damaged, newest = [], None
        sweep(self.folder, "step-*")
        for step, folder in saved_states(self.folder).items():
            numbers, damage = examine(folder, files=newest is None)
            if numbers and newest is None:
                newest = numbers
                self._know(numbers)
            elif numbers and "held_out" in numbers:
                self.held_out[step] = numbers["held_out"]
            elif damage and newest is None:
                damaged.append(f"{folder.name} ({damage})")
                print(f"warning: the state {folder} is damaged ({damage})", flush=True)
        if damaged and not newest:
            raise ValueError(
                f"{self.folder}: all states are damaged, {', '.join(damaged)}: "
                "remove the folder to begin again"
            )
        return newest

    def _know(self, numbers):
        """Remember an undamaged state. One that was saved while updates were being skipped may be
        the state of a run that is lost: it takes no other's place."""
        if not numbers["skipped"]:
            self.good.add(numbers["step"])
        if "held_out" in numbers:
            self.held_out[numbers["step"]] = numbers["held_out"]

    def best(self):
        """(step, held-out loss) of the undamaged state with the lowest; (None, None) without."""
        return self.from_first(self._best)

    def _best(self):
        for step in sorted(self.held_out, key=self.held_out.get):
            if examine(state_folder(self.folder, step))[0]:
                return step, self.held_out[step]
        return None, None

    # ---- loading

    def attach(self, model, optimizer, at):
        """Save and load this model and this optimizer from now on. Load the state of `at`, if it
        is not the beginning."""
        fill_state(optimizer)
        self.tensors = training_state(model, optimizer)
        if at.step:
            self.load(at.step, self.tensors)
            count_updates(optimizer, at.updates)

    def load(self, step, tensors):
        """Fill {name: tensor} from the state after `step` steps."""
        folder = state_folder(self.folder, step)
        try:
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(tensors, storage_reader=reader, process_group=self.group)
        except dcp.CheckpointException as error:
            raise OSError(f"cannot load {folder}: {reason(error)}") from None

    # ---- saving

    def save(self, at):
        """Save the state after `at.step` steps. OSError if its folder cannot be made, or if the
        previous state could not be written."""
        self.wait()
        start, folder = time.perf_counter(), state_folder(self.folder, at.step)
        work = Aside(folder, replace=True) if first_rank() else None
        try:
            aside = self.from_first(lambda: work.begin())
        except (ValueError, OSError) as error:
            raise self.cannot_save(folder, error) from None
        writer = dcp.HuggingFaceStorageWriter(
            path=str(aside),
            fqn_to_index_mapping=numbers_of_files(self.tensors),
            save_distributed=True,
        )
        written = dcp.async_save(self.tensors, storage_writer=writer, process_group=self.group)
        numbers = dataclasses.asdict(at) | {"identity": self.identity}
        self.pending.append((folder, self.thread.submit(self._publish, written, work, numbers)))
        self.saved = at.step
        if first_rank():
            stalled = time.perf_counter() - start
            print(f"saving the state after step {at.step - 1}, stalled {stalled:.2f} s", flush=True)

    def _publish(self, written, work, numbers):
        """Make a state visible once all ranks have written it. Returns what went wrong, or None."""
        try:
            written.result()
            if work:
                files = sorted(work.aside.glob("*.safetensors"))
                with ThreadPoolExecutor() as pool:
                    prints = pool.map(fingerprint, files)
                    numbers["files"] = dict(zip((file.name for file in files), prints))
                write_numbers(work.aside, numbers)
                work.publish()
                self._know(numbers)
                self._prune()
            return None
        except (OSError, dcp.CheckpointException) as error:
            return reason(error)
        finally:
            if work:
                work.discard()

    def evaluated(self, at, loss, better):
        """Note the held-out loss of the model after `at.step` steps in its state, if it has one.
        It gets one with keep_best, if it is the best so far, and if the run ends with it."""
        wanted = (
            self.options.keep_best if better else self.options.save_every and at.ended(self.options)
        )
        if wanted and self.saved != at.step:
            self.save(at)
        if self.saved == at.step and math.isfinite(loss):
            folder, noted = state_folder(self.folder, at.step), dataclasses.asdict(at)
            task = self.thread.submit(self._note, folder, noted | {"held_out": loss})
            self.pending.append((folder, task))

    def _note(self, folder, noted):
        try:
            if first_rank() and exists(folder):  # not if it could not be saved
                write_numbers(folder, json.loads((folder / "state.json").read_text()) | noted)
                self.held_out[noted["step"]] = noted["held_out"]
                self._prune()
        except OSError as error:
            return error
        return None

    def _prune(self):
        """Remove states older than the `keep` newest known to be undamaged, but not the best."""
        newer, best = 0, None
        if self.options.keep_best:
            best = min(self.held_out, key=self.held_out.get, default=None)
        for step, folder in saved_states(self.folder).items():
            if newer >= self.options.keep and step != best:
                self.held_out.pop(step, None)
                try:
                    shutil.rmtree(folder)
                except OSError as error:  # no reason to end a run
                    print(f"warning: {folder} cannot be removed: {error}", flush=True)
            newer += step in self.good

    def wait(self):
        """Wait until every state is written. OSError if one could not be."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        failed = [(folder, str(failure)) for folder, task in pending if (failure := task.result())]
        for folder, failure in self.from_first(lambda: failed):
            raise self.cannot_save(folder, failure)
        self.written = self.saved

    def cannot_save(self, folder, failure):
        fix = ""
        if self.written is not None:
            fix = f" (fix it, then --name={self.folder.parent.name} --resume goes on)"
        return OSError(f"cannot save {folder}: {failure}{fix}")


def reason(error):
    """What went wrong on which rank, if torch.distributed.checkpoint says so."""
    causes = {str(cause): rank for rank, (cause, _) in getattr(error, "failures", {}).items()}
    return "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items()) or str(error)


# --------------------------------------------------------------------------------------------------
# Whether a state is whole


def fingerprint(path):
    """[size in bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def checksum(numbers):
    """CRC-32 of what state.json says, apart from its own checksum."""
    said = {name: value for name, value in numbers.items() if name != "checksum"}
    return zlib.crc32(json.dumps(said, sort_keys=True).encode())


def write_numbers(folder, numbers):
    """Write state.json, whole or not at all."""
    numbers = numbers | {"checksum": checksum(numbers)}
    partial = folder / ".state.json.partial"
    partial.write_text(json.dumps(numbers, indent=2) + "\n")
    sync(partial)
    partial.replace(folder / "state.json")
    sync(folder)


NUMBERS = {"step": int, "updates": int, "identity": dict, "files": dict}  # always in state.json
OPTIONAL = {"skipped": int, "best": float, "waited": int, "held_out": float, "checksum": int}


def examine(folder, files=True):
    """(the numbers of a saved state, or None if it is damaged; what is damaged, or None). Unless
    `files`, the contents of the tensors' files are not looked at."""
    try:
        return examine_numbers(folder, files)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, f"{error!r:.200}"


def examine_numbers(folder, files):
    numbers = dict(json.loads((folder / "state.json").read_bytes()))
    kinds = NUMBERS | {k: kind for k, kind in OPTIONAL.items() if numbers.get(k) is not None}
    if any(type(numbers[name]) is not kind for name, kind in kinds.items()):
        return None, "state.json is not what train.py writes"
    step, updates = numbers["step"], numbers["updates"]
    if folder.name != state_folder("", step).name:
        return None, f"state.json is of step {step}"
    if not 0 <= updates <= step or numbers.get("checksum", checksum(numbers)) != checksum(numbers):
        return None, "state.json does not have its checksum"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if sorted(numbers["files"]) != names:
        return None, "files are missing, or are too many"
    if files:
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda name: fingerprint(folder / name), names)
        wrong = [name for name, mark in zip(names, found) if mark != numbers["files"][name]]
        if wrong:
            return None, f"{', '.join(wrong)} has another size or checksum"
    return {"skipped": 0} | numbers, None
