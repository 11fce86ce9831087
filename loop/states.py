"""The saved states of a training run. A state is what the run's ranks hold, one file a rank, written by
torch.distributed.checkpoint, which hands it back to any number of ranks; state.json beside the files has the plain numbers and
every file's size and checksum.
"""

import json
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from weights import first_rank, publish


class States:
    """The saved states of a run: folders `step-00000100` in `folder`, of which the last `keep` stay.

    save() copies the tensors to host memory and returns; a thread writes them while training goes on. What goes wrong on one
    rank is an OSError on all."""

    def __init__(self, folder, keep):
        self.folder, self.keep, self.pending = Path(folder), keep, None
        # the thread's own, because its messages must not mix with the loop's; and patient, while the first rank reads checksums
        self.group = dist.new_group(backend="gloo", timeout=timedelta(minutes=30))
        self.thread = ThreadPoolExecutor(1)
        if first_rank():
            for left in self.folder.glob(".step-*"):  # by a run that was killed while it saved
                shutil.rmtree(left)

    def complete(self):
        """The folders of complete states, the oldest first."""
        return sorted(self.folder.glob("step-*")) if self.folder.exists() else []

    def save(self, step, tensors, numbers):
        """Save {name: DTensor} and a dict of numbers for JSON as the state after `step` steps. Returns the seconds it stalled.
        OSError if this state's folder cannot be made, or the previous state could not be written."""
        self.wait()
        start, folder = time.perf_counter(), self.folder / f"step-{step:08d}"
        aside, failure = folder.with_name(f".{folder.name}.partial"), None
        if first_rank():
            try:
                aside.mkdir(parents=True)
            except OSError as error:
                failure = f"cannot save {folder}: {error}"
        self.agree(failure)  # and no rank writes before the folder is there
        writer = dcp.HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        written = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(self._publish, written, aside, folder, numbers)
        return time.perf_counter() - start

    def _publish(self, written, aside, folder, numbers):
        """Make the state visible once all ranks have written it. Returns what went wrong, or None."""
        try:
            written.result()
            if first_rank():
                files = sorted(aside.glob("*.safetensors"))
                with ThreadPoolExecutor() as pool:
                    numbers["files"] = dict(
                        zip((file.name for file in files), pool.map(fingerprint, files))
                    )
                (aside / "state.json").write_text(json.dumps(numbers, indent=2) + "\n")
                publish(aside, folder)
                for old in self.complete()[: -self.keep]:
                    shutil.rmtree(old)
        except (OSError, dcp.CheckpointException) as error:
            if first_rank():
                shutil.rmtree(aside, ignore_errors=True)
            causes = {
                str(cause): rank for rank, (cause, _) in getattr(error, "failures", {}).items()
            }
            reason = "; ".join(f"rank {rank}: {cause}" for cause, rank in causes.items()) or error
            return f"cannot save {folder}: {reason}"

    def wait(self):
        """Wait until the state that is being written, if any, is complete. OSError if it could not be written."""
        if self.pending:
            failure, self.pending = self.pending.result(), None
            self.agree(failure)

    def agree(self, failure):
        """OSError on all ranks if on the first rank there is a failure."""
        told = [failure]
        dist.broadcast_object_list(told, src=0, group=self.group)
        if told[0]:
            raise OSError(told[0])

    def newest(self):
        """The numbers of the newest undamaged state, on every rank; None if there is no state. ValueError if all are damaged."""
        found = [self._newest() if first_rank() else None]
        dist.broadcast_object_list(found, src=0, group=self.group)
        if isinstance(found[0], str):
            raise ValueError(found[0])
        return found[0]

    def _newest(self):
        damaged = []
        for folder in reversed(self.complete()):
            numbers, damage = examine(folder)
            if numbers:
                return numbers
            damaged.append(f"{folder.name} ({damage})")
            print(
                f"warning: the state {folder} is damaged ({damage}): trying the one before it",
                flush=True,
            )
        return (
            f"{self.folder}: all states are damaged, {', '.join(damaged)}: remove the folder to begin again"
            if damaged
            else None
        )

    def load(self, step, tensors):
        """Fill {name: DTensor} from the state after `step` steps."""
        reader = dcp.HuggingFaceStorageReader(str(self.folder / f"step-{step:08d}"))
        dcp.load(tensors, storage_reader=reader, process_group=self.group)


def fingerprint(path):
    """[size in bytes, CRC-32] of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def examine(folder):
    """(the numbers of a saved state, what is damaged in it or None)"""
    try:
        numbers = json.loads((folder / "state.json").read_text())
        kinds = {key: type(numbers[key]) for key in ("step", "updates", "identity", "files")}
        if list(kinds.values()) != [int, int, dict, dict]:
            return None, "state.json is not what train.py writes"
        if folder.name != f"step-{numbers['step']:08d}":
            return None, f"state.json is of step {numbers['step']}"
        if sorted(numbers["files"]) != sorted(path.name for path in folder.glob("*.safetensors")):
            return None, "files are missing, or are too many"
        with ThreadPoolExecutor() as pool:
            found = dict(
                zip(
                    numbers["files"],
                    pool.map(lambda name: fingerprint(folder / name), numbers["files"]),
                )
            )
        if wrong := [
            name for name, expected in numbers["files"].items() if found[name] != expected
        ]:
            return None, f"{', '.join(wrong)} has another size or checksum"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return None, repr(error)
    return numbers, None
