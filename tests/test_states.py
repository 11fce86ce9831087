"""The files of a saved state, and the host memory that saving takes."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from common import run_ranks
from loop import states
from loop.states import Progress, States, examine, numbers_of_files, state_folder

MIB = 2**20


def resident(kind):
    """VmRSS or VmHWM, its peak, of this process, in bytes."""
    return int(open("/proc/self/status").read().split(f"{kind}:")[1].split()[0]) * 1024


def memory_of_a_save(folder, file_bytes):
    """Host memory that saving takes, in times of the state, and the number of its files."""
    states.FILE_BYTES = file_bytes
    options = SimpleNamespace(keep=2, keep_best=False)
    saved = States(folder, options, {})
    saved.tensors = {f"{i}": torch.full((8 * MIB // 4,), float(i)) for i in range(32)}
    before = resident("VmRSS")
    saved.save(Progress(step=1, updates=1))
    saved.wait()
    numbers, damage = examine(state_folder(folder, 1))
    assert damage is None
    return (resident("VmHWM") - before) / (256 * MIB), len(numbers["files"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_save_takes_one_state_of_host_memory(tmp_path):
    """And a file of it, twice over. With all of a rank's tensors in one file it takes three."""
    ((times, files),) = run_ranks(1, memory_of_a_save, tmp_path / "many", 16 * MIB)
    assert files == 16 and 0.9 < times < 1.3
    ((times, files),) = run_ranks(1, memory_of_a_save, tmp_path / "one", 2**30)
    assert files == 1 and times > 2.5


def numbers_on_this_rank():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tensors = {
        "a": torch.ones(4),
        "b": torch.ones(8),
        "c": torch.ones(100),
        "d": torch.ones(1),
        "sharded": distribute_tensor(torch.ones(24), mesh, [Shard(0)]),
    }
    states.FILE_BYTES = 52  # bytes: a and b are 48 together, d and half of `sharded` 52
    return numbers_of_files(tensors)


def test_numbers_of_files():
    """A tensor larger than a file has one of its own. A sharded one counts what the rank holds."""
    expected = {"a": 1, "b": 1, "c": 2, "d": 3, "sharded": 3}
    assert run_ranks(2, numbers_on_this_rank) == [expected, expected]
    assert states.FILE_BYTES < 2**30
