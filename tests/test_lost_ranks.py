"""What becomes of the other ranks when one is lost: they end, soon, and one of them says which."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from conftest import ROOT
from loop import guards
from loop.guards import PULSE, ROLL_CALL, TIME_TO_REPORT, roll_call
from runs import ENDLESS, NO_GPU, Run, losses, make_home, states


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("lost"))


# --------------------------------------------------------------------------------------------------
# One hangs, is killed, or fails


class Lose:
    """prepare(rank): rank 1 is stopped as it comes to train.`place`."""

    def __init__(self, place):
        self.place = place

    def __call__(self, rank):
        import train

        there = getattr(train, self.place)

        def lost(*arguments, **settings):
            os.kill(os.getpid(), signal.SIGSTOP)
            return there(*arguments, **settings)

        if rank == 1:
            setattr(train, self.place, lost)


LOST = {  # where a rank is lost: what it was doing
    "start_ranks": "meeting the others",
    "build_model": "building the model",
    "load_weights": "loading weights",
    "build_optimizer": "about to load a state",
    "learning_rate": "in a step",
    "save_weights": "writing the trained weights",
}


# some of them among the slow tests: a lost rank takes its timeout to be noticed
QUICK = "start_ranks", "learning_rate"
PLACES = [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in LOST]


@pytest.mark.parametrize("place", PLACES)
def test_a_lost_rank_ends_the_others(home, base, copy, place):
    """Within --timeout and a few seconds, with one message that names it."""
    options = ("tiny.py", f"--name={copy.name}", "--resume", "--timeout=5", "--steps=14")
    if place == "load_weights":
        options = ("--checkpoint=runs/base", "--data=corpus", "--seq_len=32", "--timeout=5")
        options += (f"--name={copy.name}-tuned",)
    run, start = Run(home, *options, ranks=2, prepare=Lose(place)), time.monotonic()
    assert run.wait(grace=1) == [1, -signal.SIGKILL] and time.monotonic() - start < 60, run.text()
    assert run.text().count("error: rank 1 died or hangs") == 1, run.text()
    assert run.text().count("error: ") == 1 and "Traceback" not in run.text(), run.text()


def test_a_killed_rank_ends_the_others(home):
    run = Run(home, *ENDLESS, "--name=dies", "--sp=2", ranks=4).wait_for_step(2)
    run.kill(ranks=[2])
    start = time.monotonic()
    assert run.wait() == [1, 1, -signal.SIGKILL, 1] and time.monotonic() - start < 15
    assert run.text().count("error: rank 2 died or hangs") == 1 and "Traceback" not in run.text()


def break_rank_1(rank):
    import train

    if rank == 1:
        good = train.learning_rate
        train.learning_rate = lambda options, step: good(options, step) if step < 3 else 1 / 0


def test_an_error_on_one_rank_ends_the_others(home):
    """A bug: its traceback is shown, once, and the other rank does not wait for ever."""
    run = Run(home, *ENDLESS, "--name=bug", "--log_every=100", ranks=2, prepare=break_rank_1)
    start = time.monotonic()
    assert run.wait() == [1, 1] and time.monotonic() - start < 30
    assert run.text().count("ZeroDivisionError") == 1 and run.text().count("Traceback") == 1


END_WHILE_THE_PULSE_BEATS = """
import time, torch.distributed as dist
from loop import guards
from loop.options import Options
from datetime import timedelta
guards.PULSE = 0  # all the time
watch = guards.Watch(Options())
dist.init_process_group("gloo", timeout=timedelta(seconds=30), **guards.meeting_point(30))
began = time.monotonic()
while time.monotonic() < began + 0.3:
    pass
dist.destroy_process_group()
"""


def test_a_rank_that_is_done_ends_well():
    """A thread that Python stopped inside PyTorch's store would abort the process."""
    patience = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    where = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    where |= {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    where |= {"TORCHELASTIC_RESTART_COUNT": "0", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-c", END_WHILE_THE_PULSE_BEATS]
    ended = subprocess.run(script, env=NO_GPU | where, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "terminate" not in ended.stderr, ended.stderr
    assert store.add("pulse/0/0", 0) > 10


# --------------------------------------------------------------------------------------------------
# Where nothing interrupts the others


class Hang:
    """prepare(rank): in step 3 rank 2 is killed, or has an error, and the others wait for ever, as
    inside NCCL."""

    def __init__(self, how):
        self.how = how

    def __call__(self, rank):
        import train
        from loop import guards

        guards.ROLL_CALL = 3
        good = train.learning_rate

        def learning_rate(options, step):
            if step == 3 and rank == 2:
                if self.how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise ZeroDivisionError
            if step == 3:
                time.sleep(1000)
            return good(options, step)

        train.learning_rate = learning_rate


@pytest.mark.parametrize("how", [pytest.param("killed", marks=pytest.mark.slow), "failed"])
def test_ranks_that_hang_end_when_they_are_asked_to_stop(home, how):
    """torchrun asks them once it has lost one, and kills them 30 s later."""
    run = Run(home, *ENDLESS, f"--name=hang-{how}", "--sp=2", ranks=4, prepare=Hang(how))
    run.wait_for_step(2)
    start, lost = time.monotonic(), -signal.SIGKILL if how == "killed" else 1
    # one after the other they would take three times as long
    assert run.wait() == [1, 1, lost, 1] and time.monotonic() - start < 17, run.text()
    said = "error: rank 2 died or hangs" if how == "killed" else "Traceback"
    assert run.text().count(said) == 1, run.text()
    assert run.text().count("error: ") == (how == "killed"), run.text()


def test_who_misses_a_roll_call(monkeypatch):
    """Not the rank that calls, though its beating thread may be the one that does."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(guards, "ROLL_CALL", 1)
    store = dist.HashStore()
    assert roll_call(store) == [1, 2]
    threading.Timer(0.5, store.add, [guards.pulse_key(2), 1]).start()
    assert roll_call(store) == [1]


def slow_to_leave(rank):
    from loop import guards, states

    guards.ROLL_CALL = 1
    good = states.States.wait

    def wait(self):
        if self.pending and rank == 1:
            time.sleep(5)
        good(self)

    states.States.wait = wait


@pytest.mark.slow
def test_a_stop_may_take_its_time(home):
    """While all ranks live they are not ended, and the state is saved."""
    run = Run(home, *ENDLESS, "--name=slow", ranks=2, prepare=slow_to_leave).wait_for_step(2)
    run.kill(signal.SIGTERM)
    assert "error" not in run.ends_well().text()
    assert states(home, "slow") == [f"step-{len(losses(home, 'slow')):08d}"]


@pytest.mark.slow
def test_a_rank_that_comes_back_is_not_lost(home):
    """It has no pulse for a while, as when it holds Python's lock, but answers the roll call."""
    run = Run(home, *ENDLESS, "--name=back", ranks=2).wait_for_step(2)
    run.kill(signal.SIGSTOP, ranks=[1])
    run.kill(signal.SIGTERM)
    time.sleep(ROLL_CALL + 3)
    run.kill(signal.SIGCONT, ranks=[1])
    assert "error" not in run.ends_well().text()
    assert states(home, "back") == [f"step-{len(losses(home, 'back')):08d}"]


# --------------------------------------------------------------------------------------------------
# Timeouts


def print_groups(rank):
    """Instead of training."""
    import sp
    import train

    start = train.start_ranks

    def start_and_print(options):
        device, mesh = start(options)
        groups = {name: mesh[name].get_group() for name in mesh.mesh_dim_names}
        groups |= {"all": dist.group.WORLD} | ({"sp": sp.group()} if sp.group() else {})
        found = {
            name: [
                dist.get_process_group_ranks(group),
                group._get_backend(device).options._timeout.total_seconds(),
            ]
            for name, group in groups.items()
        }
        os.write(1, f"{json.dumps([rank, found])}\n".encode())  # one line, whatever others write
        os._exit(0)

    train.start_ranks = start_and_print


GROUPS = {  # of ranks 0 and 3 of four
    ("--sp=2", "--replicas=2"): (
        {"all": [0, 1, 2, 3], "sp": [0, 1], "shard": [0, 1], "replica": [0, 2]},
        {"all": [0, 1, 2, 3], "sp": [2, 3], "shard": [2, 3], "replica": [1, 3]},
    ),
    ("--sp=2",): (
        {"all": [0, 1, 2, 3], "sp": [0, 1], "shard": [0, 1, 2, 3]},
        {"all": [0, 1, 2, 3], "sp": [2, 3], "shard": [0, 1, 2, 3]},
    ),
    (): ({"all": [0, 1, 2, 3], "shard": [0, 1, 2, 3]},) * 2,
}


GROUPINGS = [x if len(x) == 2 else pytest.param(x, marks=pytest.mark.slow) for x in GROUPS]


@pytest.mark.parametrize("options", GROUPINGS, ids=" ".join)
def test_all_groups_have_one_timeout(home, options):
    """Longer than --timeout, so that a lost rank is reported by our line before NCCL's watchdog
    aborts all others."""
    name = f"--name=groups-{len(options)}"
    arguments = ("tiny.py", "--micro_batch=1", "--timeout=77", name, *options)
    run = Run(home, *arguments, ranks=4, prepare=print_groups)
    lines = [line for line in run.ends_well().text().splitlines() if line.startswith("[")]
    found = dict(json.loads(line) for line in lines)
    for rank, expected in zip((0, 3), GROUPS[options]):
        assert found[rank] == {k: [ranks, 77 + TIME_TO_REPORT] for k, ranks in expected.items()}
    assert TIME_TO_REPORT > 2 * PULSE + 12 + ROLL_CALL
