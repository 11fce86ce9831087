"""What train.py promises when things go wrong: kills, signals, bad numbers, full disks.

Everything here happens to the real loop in processes of its own; see runs.py. Lost ranks are in
test_lost_ranks.py, bad input is in test_bad_input.py."""

import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from loop.guards import hold
from loop.states import checksum, examine
from model import GPTOSS
from runs import BASE, ENDLESS, NO_GPU, Run, held_out, losses, make_home, states, train
from soak import soak


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("resilience"))


# --------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.slow
def test_killed_twenty_times(home):
    """At random moments, every second time in the middle of a save. The end is that of the run
    that was left alone."""
    options = ("tiny.py", "--steps=120", "--save_every=2")
    train(home, *options, "--name=alone")
    generator, folder, in_saves, kills = random.Random(0), home / "runs/killed", 0, 0
    while kills < 20:
        run, started = Run(home, *options, "--name=killed", "--resume"), time.monotonic()
        if kills % 2:
            saves = generator.randint(1, 3)  # this many saves from now
            while saves and run.processes[0].is_alive():
                saves -= any((folder / "states").glob(".step-*.partial*"))
                time.sleep(0.005)
        else:
            time.sleep(generator.uniform(0, 1.2))
        run.kill()
        codes = run.wait()
        in_saves += any((folder / "states").glob(".step-*.partial*"))
        kills += 1
        assert codes in ([-signal.SIGKILL], [0]) and time.monotonic() - started < 60, run.text()
    text = train(home, *options, "--name=killed", "--resume")
    assert in_saves >= 3 and "damaged" not in text
    assert losses(home, "killed") == losses(home, "alone")
    ours, theirs = (
        GPTOSS.from_checkpoint(home / "runs" / name / "model") for name in ("killed", "alone")
    )
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert states(home, "killed") == states(home, "alone") == ["step-00000118", "step-00000120"]
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in (home / "runs/alone").iterdir()}


@pytest.mark.slow
def test_soak(tmp_path):
    assert "no file left behind" in soak(tmp_path, seconds=60)


def test_saving_goes_on_beside_the_steps(home, base):
    assert len(losses(home, base)) == 12
    assert states(home, base) == [f"step-{n:08d}" for n in (4, 8, 12)]
    text = train(home, "tiny.py", "--steps=4", "--save_every=2", "--name=stalls")
    assert re.findall(r"saving the state after step (\d), stalled \d+\.\d\d s", text) == ["1", "3"]


# --------------------------------------------------------------------------------------------------
# Damaged states


def first_file(state):
    return sorted(state.glob("*.safetensors"))[0]


def edit_json(state, sign=True, **changes):
    numbers = json.loads((state / "state.json").read_text()) | changes
    numbers |= {"checksum": checksum(numbers)} if sign else {}
    (state / "state.json").write_text(json.dumps(numbers))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


OTHER_FILES = {"../step-00000008/model.safetensors": [1, 1]}
DAMAGE = {  # what happens to the folder of a state
    "a bit": lambda state: flip_a_bit(first_file(state)),
    "truncated": lambda state: os.truncate(first_file(state), 1000),
    "empty file": lambda state: os.truncate(first_file(state), 0),
    "file missing": lambda state: first_file(state).unlink(),
    "file too many": lambda state: shutil.copy(first_file(state), state / "other.safetensors"),
    "no state.json": lambda state: (state / "state.json").unlink(),
    "half a state.json": lambda state: os.truncate(state / "state.json", 100),
    "nested state.json": lambda state: (state / "state.json").write_text("[" * 100_000),
    "binary state.json": lambda state: (state / "state.json").write_bytes(b"\xff\x00"),
    "a list": lambda state: (state / "state.json").write_text("[1, 2]"),
    "no step": lambda state: edit_json(state, step=None),
    "another step": lambda state: edit_json(state, step=11),
    "a step too many": lambda state: edit_json(state, updates=13),
    "updates below zero": lambda state: edit_json(state, updates=-3),
    "an edited number": lambda state: edit_json(state, updates=11, sign=False),
    "an edited identity": lambda state: edit_json(state, identity={}, sign=False),
    "a word for a loss": lambda state: edit_json(state, held_out="low"),
    "files elsewhere": lambda state: edit_json(state, files=OTHER_FILES),
    "files no dict": lambda state: edit_json(state, files=[]),
    "no identity": lambda state: edit_json(state, identity=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(copy, damage):
    state = copy / "states/step-00000012"
    assert examine(state)[1] is None
    DAMAGE[damage](state)
    numbers, problem = examine(state)
    assert numbers is None and problem
    shutil.rmtree(copy)


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_state_json(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("step") / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_bytes(data)
    assert examine(folder)[0] is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(st.sampled_from(["step", "updates", "skipped", "files", "identity", "best"]), JSON)
def test_any_type_in_a_state_json(tmp_path_factory, key, value):
    folder = tmp_path_factory.mktemp("step") / "step-00000001"
    folder.mkdir()
    numbers = {"step": 1, "updates": 1, "identity": {}, "files": {}}
    (folder / "state.json").write_text(json.dumps(numbers | {key: value}))
    found, damage = examine(folder)
    assert (found is None) == (damage is not None)
    assert (
        found is None
        or type(value) is type({**numbers, "skipped": 0, "best": 0.5}[key])
        or (value is None and key in ("skipped", "best"))
    )


def test_the_state_before_a_damaged_one_is_used(home, base, copy):
    flip_a_bit(first_file(copy / "states/step-00000012"))
    os.truncate(first_file(copy / "states/step-00000008"), 50)
    text = train(home, *BASE, f"--name={copy.name}", "--resume", ranks=2)
    assert text.count("warning: the state") == 2
    assert "step-00000012 is damaged" in text and "step-00000008 is damaged" in text
    assert "goes on after step 3\n" in text
    assert losses(home, copy.name) == losses(home, base)
    assert all(examine(state)[1] is None for state in (copy / "states").iterdir())


def test_all_states_damaged(home, copy):
    """To begin again in silence would lose a run."""
    for state in (copy / "states").iterdir():
        (state / "state.json").unlink()
    run = Run(home, *BASE, f"--name={copy.name}", "--resume", ranks=2)
    assert run.wait(grace=2) == [1, 1] and "error: " in run.text()
    assert run.text().count("all states are damaged") == 1
    assert "remove the folder to begin again" in run.text()
    assert len(losses(home, copy.name)) == 12


def cannot_list_states(rank):
    """As a folder without permission, or on a disk that fails, would: root may read everything."""
    listdir = os.listdir

    def fails(path="."):
        if Path(path).name == "states":
            raise PermissionError(13, "Permission denied", str(path))
        return listdir(path)

    os.listdir = fails


@pytest.mark.parametrize("ended", [True, False])
def test_states_that_cannot_be_read_are_not_absent(home, copy, ended):
    """The run would begin again and forget what was logged."""
    if not ended:
        shutil.rmtree(copy / "model")
    before = (copy / "metrics.jsonl").read_bytes()
    options = (*BASE, f"--name={copy.name}", "--resume")
    run = Run(home, *options, ranks=2, prepare=cannot_list_states)
    assert 0 not in run.wait(grace=2)
    assert run.text().count("error: ") == run.text().count("Permission denied") == 1, run.text()
    assert (copy / "metrics.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------------------------
# Asked to leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_asked_to_stop(home, number):
    """One of the ranks is told; both finish the step, save and leave with exit code 0."""
    name = f"polite-{number.name}"
    run = Run(home, *ENDLESS, f"--name={name}", ranks=2).wait_for_step(2)
    run.kill(number, ranks=[1])
    text = run.ends_well().text()
    steps = len(losses(home, name))
    assert f"asked to stop: --resume goes on after step {steps - 1}\n" in text
    assert states(home, name) == [f"step-{steps:08d}"]
    if number == signal.SIGTERM:
        run = Run(home, *ENDLESS, f"--name={name}", "--resume", ranks=2).wait_for_step(steps)
        run.kill(number)
        assert f"goes on after step {steps - 1}\n" in run.ends_well().text()


def test_second_ctrl_c_ends_at_once(home):
    """Even where the first one has no effect, because the other rank never ends the step."""
    run = Run(home, *ENDLESS, "--name=impatient", ranks=2).wait_for_step(2)
    run.kill(signal.SIGSTOP, ranks=[1])
    time.sleep(0.5)
    run.kill(signal.SIGINT, ranks=[0])
    time.sleep(1)
    assert run.processes[0].is_alive()
    run.kill(signal.SIGINT, ranks=[0])
    run.processes[0].join(5)
    assert run.processes[0].exitcode == 128 + signal.SIGINT
    run.kill()
    run.wait()


# --------------------------------------------------------------------------------------------------
# Under torchrun


def torchrun(home, *arguments, port=None, nodes=1, restarts=3, script=ROOT / "train.py"):
    """Start torchrun with two ranks in all; `printed()` of what it returns is its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--monitor_interval=0.1"]
    command += [f"--max_restarts={restarts}", f"--nproc_per_node={2 // nodes}"]
    environment = dict(NO_GPU)
    if nodes == 1:
        command.append("--standalone")
    else:
        rendezvous = f"--rdzv_endpoint=127.0.0.1:{port}"
        command += [f"--nnodes={nodes}", "--rdzv_backend=c10d", rendezvous]
        command.append("--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3")
        # or a node that comes back would wait for an address that torchrun publishes once
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command += [script, "tiny.py", "--resume", *arguments]
    output = open(home / f"torchrun-{os.urandom(4).hex()}", "w+")  # noqa: SIM115
    streams = {"stdout": output, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=home, env=environment, **streams)
    process.printed = lambda: Path(output.name).read_text()
    return process


def children(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def gone(pids):
    return lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids)


def lines_logged(home, name):
    path = home / "runs" / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(home):
    process = torchrun(home, "--steps=40", "--save_every=3", "--name=restarted")
    until(lambda: lines_logged(home, "restarted") > 7)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(120) == 0, process.printed()
    assert len(losses(home, "restarted")) == 40
    assert re.search(r"goes on after step \d", process.printed())
    assert re.search(r"(local_rank: |rank )1", process.printed()), process.printed()


@pytest.mark.slow
def test_ranks_without_their_torchrun_save_and_leave(home):
    process = torchrun(home, "--steps=100000", "--name=orphans")
    until(lambda: lines_logged(home, "orphans") > 3)
    ranks = children(process)
    process.kill()
    process.wait()
    until(gone(ranks), 30)
    assert states(home, "orphans") == [f"step-{len(losses(home, 'orphans')):08d}"]


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import train
train.build_model = lambda *_: print("building", flush=True) or time.sleep(1000)
train.main()
"""


@pytest.mark.slow
def test_ranks_without_their_torchrun_leave_while_the_model_is_built(home):
    (home / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    process = torchrun(home, "--name=young-orphans", script=home / "slow.py")
    until(lambda: process.printed().count("building") == 2)
    ranks = children(process)
    process.kill()
    process.wait()
    until(gone(ranks), 30)
    assert process.printed().count("error: torchrun is gone") == 1


@pytest.mark.slow
def test_an_error_is_torchruns_last_word_too(home):
    """After the one line, torchrun prints some thirty of its own."""
    process = torchrun(home, "--name=wrong", "--dropout=0.1", restarts=0)
    assert process.wait(120) == 1
    message = "error: there is no option dropout: GPT-OSS has none"
    text = process.printed()
    assert text.count(message) >= 2 and message in text[-400:], text


@pytest.mark.slow
def test_a_killed_node_comes_back(home):
    """Two torchruns on loopback. One of them is killed with its rank and started again: the run
    goes on by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--steps=40", "--save_every=3", "--name=nodes", "--sp=2")
    host = torchrun(home, *options, port=port, nodes=2)
    time.sleep(1)  # so that this one keeps the rendezvous
    guest = torchrun(home, *options, port=port, nodes=2)
    until(lambda: lines_logged(home, "nodes") > 7)
    for pid in [*children(guest), guest.pid]:
        os.kill(pid, signal.SIGKILL)
    guest.wait()
    time.sleep(5)  # until the rendezvous has noticed
    guest = torchrun(home, *options, port=port, nodes=2)
    assert (host.wait(150), guest.wait(60)) == (0, 0), host.printed() + guest.printed()
    assert len(losses(home, "nodes")) == 40
    assert re.search(r"goes on after step \d", host.printed() + guest.printed())


# --------------------------------------------------------------------------------------------------
# Two runs of one name


def test_of_two_runs_of_one_name_one_is_refused(home):
    """The second one waits for the first to leave the folder, and then finds a run in it."""
    runs = [Run(home, "tiny.py", "--steps=4", "--name=same", f"--seed={seed}") for seed in (0, 1)]
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [[0], [1]]
    refused = runs[codes.index([1])].text()
    assert refused.startswith("error: runs/same already holds a run") or "is in use" in refused


def test_a_folder_has_one_run_at_a_time(home):
    run = Run(home, *ENDLESS, "--name=busy").wait_for_step(2)
    with pytest.raises(ValueError, match="runs/busy is in use by a run that is still going"):
        hold(home / "runs/busy", patience=0.3)
    run.kill()
    run.wait()
    hold(home / "runs/busy", patience=5)


# --------------------------------------------------------------------------------------------------
# Numbers go bad


def one_bad_loss(rank):
    """The forward of step 3 gives NaN on rank 1 only."""
    good, calls = GPTOSS.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        bad = rank == 1 and len(calls) == 4
        return good(self, *args, **kwargs) * (float("nan") if bad else 1)

    GPTOSS.forward = forward


def test_a_bad_step_is_skipped_on_all_ranks(home):
    options = ("tiny.py", "--steps=8", "--save_every=8", "--name=hiccup")
    text = train(home, *options, ranks=2, prepare=one_bad_loss)
    found = losses(home, "hiccup")
    assert [step for step, loss in enumerate(found) if loss != loss] == [3]
    assert text.count("step 3: loss nan, gradient norm nan: update skipped, 1 in a row") == 1
    assert examine(home / "runs/hiccup/states/step-00000008")[0]["updates"] == 7
    train(home, "tiny.py", "--steps=8", "--name=healthy", ranks=2)
    healthy = losses(home, "healthy")
    assert found[:3] == healthy[:3] and abs(found[7] - healthy[7]) < 0.1


def test_too_many_bad_steps_in_a_row(home):
    """After one update with a learning rate beyond reason nothing is finite any more."""
    run = Run(home, "tiny.py", "--lr=1e38", "--warmup_steps=0", "--name=nan", ranks=2)
    assert run.wait(grace=2) == [1, 1]
    assert [f"{n} in a row" in run.text() for n in range(1, 7)] == [True] * 5 + [False]
    (message,) = [line for line in run.text().splitlines() if line.startswith("error")]
    step = int(re.search(r"step (\d+), sequences (\d+) to (\d+) of corpus", message)[1])
    assert f"sequences {4 * step} to {4 * step + 3} of corpus" in message
    assert "5 updates in a row were not finite" in message
    gradient = r"[a-z_.0-9]*(?:weight|bias|sinks) (?:nan|inf|[0-9.e+-]+)"
    assert len(re.findall(gradient, message.split("gradients:")[1])) == 5


def nan_evaluation(rank):
    import train

    train.evaluate = lambda *_: float("nan")


def test_an_evaluation_that_is_not_finite_is_never_the_best(home):
    options = ("tiny.py", "--steps=4", "--eval_every=2", "--save_every=2", "--keep_best")
    text = train(home, *options, "--name=nan-best", prepare=nan_evaluation)
    assert "best" not in text.replace("nan-best", "") and len(held_out(home, "nan-best")) == 2


# --------------------------------------------------------------------------------------------------
# Full disk


def small_files(rank):
    """Rank 1 can write no file of more than 100 kB: less than its part of a state."""
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def no_large_files(rank):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def fails_to_publish(rank):
    from loop import states

    good = states.fingerprint

    def full(path):
        if "partial" in str(path):
            raise OSError(28, "No space left on device", str(path))
        return good(path)

    states.fingerprint = full


@pytest.mark.parametrize("prepare", [small_files, fails_to_publish])
def test_full_disk_while_saving(home, prepare):
    """One message on one of the ranks, no half-written state, and the run can continue from the
    state before."""
    name = f"full-{prepare.__name__}"
    train(home, "tiny.py", "--steps=4", "--save_every=4", f"--name={name}", ranks=2)
    options = ("tiny.py", "--steps=10", "--save_every=4", f"--name={name}", "--resume")
    run = Run(home, *options, ranks=2, prepare=prepare)
    assert run.wait(grace=5) == [1, 1]
    (message,) = [line for line in run.text().splitlines() if line.startswith("error")]
    assert f"cannot save runs/{name}/states/step-00000008" in message
    assert message.endswith(f"(fix it, then --name={name} --resume goes on)")
    assert "File too large" in message or "No space left" in message
    assert "Traceback" not in run.text()
    assert states(home, name) == ["step-00000004"]
    assert "goes on after step 3\n" in train(home, *options, ranks=2)


def test_full_disk_while_the_weights_are_written(home):
    run = Run(home, "tiny.py", "--steps=2", "--name=full-model", ranks=2, prepare=no_large_files)
    assert run.wait(grace=10) == [1, 1] and run.text().count("\nerror: ") == 1
    assert "runs/full-model/model" in run.text() and "Traceback" not in run.text()
    assert not any("model" in path.name for path in (home / "runs/full-model").iterdir())


def test_nothing_unpickles():
    """Files are data: no code of ours reads a pickle."""
    pattern = r"torch\.load\b|\bpickle\b|\bmarshal\b|allow_pickle=True|\bshelve\b"
    for path in [*ROOT.glob("*.py"), *ROOT.glob("loop/*.py"), *ROOT.glob("bench/*.py")]:
        assert not re.search(pattern, path.read_text().replace("never pickle", "")), path
