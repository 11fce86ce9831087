"""What train.py promises when things go wrong: kills, signals, lost ranks, bad numbers, bad input, full disks.

Everything here happens to the real loop in processes of its own; see loop.py."""

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
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from runs import NO_GPU, Run, losses, make_home, train, write_corpus
from soak import soak

from loop.guards import hold
from loop.states import examine
from model import GPTOSS, GPTOSSConfig
from weights import INDEX

ENDLESS = ("tiny.py", "--steps=100000", "--warmup_steps=5")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("resilience"))


@pytest.fixture(scope="module")
def base(home):
    """The name of a run of 30 steps on two ranks that kept its states after 10, 20 and 30."""
    train(home, *BASE, "--name=base", ranks=2)
    return "base"


BASE = ("tiny.py", "--steps=30", "--save_every=10", "--keep=3")


def copy_of(home, run):
    folder = home / "runs" / f"{run}-{os.urandom(4).hex()}"
    shutil.copytree(home / "runs" / run, folder)
    return folder


def states(folder):
    """Names of all that is in a run's states/, hidden files too."""
    return sorted(path.name for path in (folder / "states").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Killed


@pytest.mark.slow
def test_killed_twenty_times(home):
    """At random moments, every second time in the middle of a save; the end is that of the run that was left alone."""
    options = ("tiny.py", "--steps=120", "--save_every=2")
    train(home, *options, "--name=alone")
    generator, folder, in_saves, kills = random.Random(0), home / "runs/killed", 0, 0
    while kills < 20:
        run, started = Run(home, *options, "--name=killed", "--resume=true"), time.monotonic()
        if kills % 2:
            saves = generator.randint(1, 3)  # this many saves from now
            while saves and run.processes[0].is_alive():
                saves -= any((folder / "states").glob(".step-*"))
                time.sleep(0.005)
        else:
            time.sleep(generator.uniform(0, 1.2))
        run.kill()
        codes = run.wait()
        in_saves += any((folder / "states").glob(".step-*"))
        kills += 1
        assert codes in ([-signal.SIGKILL], [0]) and time.monotonic() - started < 60, run.text()
    text = train(home, *options, "--name=killed", "--resume=true")
    assert in_saves >= 3 and "damaged" not in text
    assert losses(home, "killed") == losses(home, "alone")
    ours, theirs = (
        GPTOSS.from_checkpoint(home / "runs" / name / "model") for name in ("killed", "alone")
    )
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))
    assert states(folder) == states(home / "runs/alone") == ["step-00000118", "step-00000120"]
    assert {path.name for path in folder.iterdir()} == {
        path.name for path in (home / "runs/alone").iterdir()
    }


@pytest.mark.slow
def test_soak(tmp_path):
    assert "no file left behind" in soak(tmp_path, seconds=60)


def test_saving_goes_on_beside_the_steps(home, base):
    text = (home / "runs" / base / "metrics.jsonl").read_text()
    assert len(text.splitlines()) == 30 and states(home / "runs" / base) == [
        f"step-{n:08d}" for n in (10, 20, 30)
    ]
    text = train(home, "tiny.py", "--steps=4", "--save_every=2", "--name=stalls")
    assert re.findall(r"saving the state after step (\d), stalled \d+\.\d\d s", text) == ["1", "3"]


# ----------------------------------------------------------------------------------------------------------------------
# Damaged


def first_file(state):
    return sorted(state.glob("*.safetensors"))[0]


def edit_json(state, **changes):
    numbers = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**numbers, **changes}))


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


DAMAGE = {
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
    "another step": lambda state: edit_json(state, step=29),
    "files elsewhere": lambda state: edit_json(
        state, files={"../step-00000020/model.safetensors": [1, 1]}
    ),
    "files no dict": lambda state: edit_json(state, files=[]),
    "no identity": lambda state: edit_json(state, identity=3),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen(home, base, damage):
    folder = copy_of(home, base)
    assert examine(folder / "states/step-00000030")[1] is None
    DAMAGE[damage](folder / "states/step-00000030")
    numbers, problem = examine(folder / "states/step-00000030")
    assert numbers is None and problem
    shutil.rmtree(folder)


def test_the_state_before_a_damaged_one_is_used(home, base):
    folder = copy_of(home, base)
    flip_a_bit(first_file(folder / "states/step-00000030"))
    os.truncate(first_file(folder / "states/step-00000020"), 50)
    text = train(home, *BASE, f"--name={folder.name}", "--resume=true", ranks=2)
    assert (
        text.count("warning") == 2
        and "step-00000030 is damaged" in text
        and "step-00000020 is damaged" in text
    )
    assert "goes on after step 9\n" in text
    assert losses(home, folder.name) == losses(home, base)
    assert all(examine(state)[1] is None for state in (folder / "states").iterdir())


def test_all_states_damaged(home, base):
    """To begin again in silence would lose a run."""
    folder = copy_of(home, base)
    for state in (folder / "states").iterdir():
        (state / "state.json").unlink()
    run = Run(home, *BASE, f"--name={folder.name}", "--resume=true", ranks=2)
    assert run.wait(grace=2) == [1, 1] and "error: " in run.text()
    assert (
        run.text().count("all states are damaged") == 1
        and "remove the folder to begin again" in run.text()
    )
    assert len(losses(home, folder.name)) == 30


# ----------------------------------------------------------------------------------------------------------------------
# Asked to leave


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_leave_politely(home, number):
    """One of the ranks is told; both finish the step, save and leave well."""
    name = f"polite-{number.name}"
    run = Run(home, *ENDLESS, f"--name={name}", ranks=2).wait_for("step 2 |")
    run.kill(number, ranks=[1])
    text = run.ends_well().text()
    steps = len(losses(home, name))
    assert f"asked to stop: --resume=true goes on after step {steps - 1}\n" in text
    assert states(home / "runs" / name) == [f"step-{steps:08d}"]
    if number == signal.SIGTERM:
        run = Run(home, *ENDLESS, f"--name={name}", "--resume=true", ranks=2).wait_for(
            f"step {steps} |"
        )
        run.kill(number)
        assert f"goes on after step {steps - 1}\n" in run.ends_well().text()


def test_second_ctrl_c_ends_at_once(home):
    """Even where the first one cannot be heard, because the other rank never ends the step."""
    run = Run(home, *ENDLESS, "--name=impatient", ranks=2).wait_for("step 2 |")
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


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that fail


def test_a_killed_rank_ends_the_others(home):
    run = Run(home, *ENDLESS, "--name=dies", "--sp=2", ranks=4).wait_for("step 2 |")
    run.kill(ranks=[2])
    start = time.monotonic()
    assert run.wait() == [1, 1, -signal.SIGKILL, 1] and time.monotonic() - start < 15
    assert run.text().count("error: rank 2 died or hangs") == 1 and "Traceback" not in run.text()


def test_a_hanging_rank_ends_the_others(home):
    """Within --timeout and a few seconds."""
    run = Run(home, *ENDLESS, "--name=hangs", "--timeout=4", ranks=2).wait_for("step 2 |")
    run.kill(signal.SIGSTOP, ranks=[1])
    start = time.monotonic()
    assert run.wait(grace=1) == [1, -signal.SIGKILL] and time.monotonic() - start < 20
    assert run.text().count("error: rank 1 died or hangs") == 1


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
from datetime import timedelta
dist.init_process_group("gloo", timeout=timedelta(seconds=30), **guards.meeting_point(30))
guards.PULSE = 0  # all the time
guards.keep_pulse()
began = time.monotonic()
while time.monotonic() < began + 0.3:
    pass
dist.destroy_process_group()
"""


def test_a_rank_that_is_done_ends_well():
    """A thread that Python stopped inside PyTorch's store would abort it: now and then a good run ended in torchrun's traceback."""
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    where = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
    }
    where |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONPATH": str(ROOT),
    }
    script = [sys.executable, "-c", END_WHILE_THE_PULSE_BEATS]
    ended = subprocess.run(script, env=NO_GPU | where, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and "terminate" not in ended.stderr, ended.stderr
    assert store.add("pulse/0/0", 0) > 10


def torchrun(home, *arguments, port=None, nodes=1):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--monitor_interval=0.1",
        "--max_restarts=3",
    ]
    command += (
        ["--standalone"]
        if nodes == 1
        else [f"--nnodes={nodes}", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    )
    command += [] if nodes == 1 else ["--rdzv_conf=keep_alive_interval=1,keep_alive_max_attempt=3"]
    command += [
        f"--nproc_per_node={2 // nodes}",
        ROOT / "train.py",
        "tiny.py",
        "--resume=true",
        *arguments,
    ]
    output = open(home / f"torchrun-{os.urandom(4).hex()}", "w+")  # noqa: SIM115
    # or a node that comes back would wait for an address that torchrun publishes once
    environment = NO_GPU | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if nodes > 1 else {})
    process = subprocess.Popen(
        command, cwd=home, stdout=output, stderr=subprocess.STDOUT, env=environment
    )
    process.printed = lambda: Path(output.name).read_text()
    return process


def children(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def until(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def logged(home, name):
    path = home / "runs" / name / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(home):
    process = torchrun(home, "--steps=40", "--save_every=3", "--name=restarted")
    until(lambda: logged(home, "restarted") > 7)
    os.kill(children(process)[1], signal.SIGKILL)
    assert process.wait(120) == 0, process.printed()
    assert len(losses(home, "restarted")) == 40 and re.search(
        r"goes on after step \d", process.printed()
    )
    assert "rank 1" in process.printed() or "local_rank: 1" in process.printed(), process.printed()


def test_ranks_without_their_torchrun_save_and_leave(home):
    process = torchrun(home, "--steps=100000", "--name=orphans")
    until(lambda: logged(home, "orphans") > 3)
    ranks = children(process)
    process.kill()
    process.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks), 30)
    assert states(home / "runs/orphans") == [f"step-{len(losses(home, 'orphans')):08d}"]


@pytest.mark.slow
def test_a_killed_node_comes_back(home):
    """Two torchruns on loopback. One of them is killed with its rank and started again: the run goes on by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--steps=40", "--save_every=3", "--name=nodes", "--sp=2")
    host = torchrun(home, *options, port=port, nodes=2)
    time.sleep(1)  # so that this one keeps the rendezvous
    guest = torchrun(home, *options, port=port, nodes=2)
    until(lambda: logged(home, "nodes") > 7)
    for pid in [*children(guest), guest.pid]:
        os.kill(pid, signal.SIGKILL)
    guest.wait()
    time.sleep(5)  # until the rendezvous has noticed
    guest = torchrun(home, *options, port=port, nodes=2)
    assert (host.wait(150), guest.wait(60)) == (0, 0), host.printed() + guest.printed()
    assert len(losses(home, "nodes")) == 40 and re.search(
        r"goes on after step \d", host.printed() + guest.printed()
    )


# ----------------------------------------------------------------------------------------------------------------------
# Numbers go bad


def test_of_two_runs_of_one_name_one_is_refused(home):
    """The second one waits for the first to leave the folder, and then finds a run in it."""
    runs = [Run(home, "tiny.py", "--steps=4", "--name=same", f"--seed={seed}") for seed in (0, 1)]
    codes = [run.wait() for run in runs]
    assert sorted(codes) == [[0], [1]]
    refused = runs[codes.index([1])].text()
    assert refused.startswith("error: runs/same already holds a run") or "is in use" in refused


def no_pictures(rank):
    from matplotlib.figure import Figure

    def savefig(*_, **__):
        raise RuntimeError("no LaTeX here")

    Figure.savefig = savefig


def test_a_plot_that_fails_costs_nothing_else(home):
    pytest.importorskip("matplotlib", reason="draws loss.png")
    run = Run(home, "tiny.py", "--steps=2", "--name=plain", prepare=no_pictures).ends_well()
    assert "loss.png was not drawn: no LaTeX here" in run.text()
    modes = {path.stat().st_mode & 0o777 for path in (home / "runs/plain/model").iterdir()}
    assert modes == {(home / "runs/plain/metrics.jsonl").stat().st_mode & 0o777}, (
        "others may read what they may list"
    )


def one_bad_loss(rank):
    """The forward of step 3 gives NaN on rank 1 only."""
    good, calls = GPTOSS.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        return good(self, *args, **kwargs) * (
            float("nan") if rank == 1 and len(calls) in (7, 8) else 1
        )

    GPTOSS.forward = forward


def test_a_bad_step_is_skipped_on_all_ranks(home):
    run = Run(
        home,
        "tiny.py",
        "--steps=8",
        "--save_every=8",
        "--name=hiccup",
        ranks=2,
        prepare=one_bad_loss,
    ).ends_well()
    found = [
        json.loads(line)["loss"]
        for line in (home / "runs/hiccup/metrics.jsonl").read_text().splitlines()
    ]
    assert [step for step, loss in enumerate(found) if loss != loss] == [3]
    assert run.text().count("step 3: loss nan, gradient norm nan: update skipped, 1 in a row") == 1
    assert (
        json.loads((home / "runs/hiccup/states/step-00000008/state.json").read_text())["updates"]
        == 7
    )
    train(home, "tiny.py", "--steps=8", "--name=healthy", ranks=2)
    assert (
        found[:3] == losses(home, "healthy")[:3]
        and abs(found[7] - losses(home, "healthy")[7]) < 0.1
    )


def test_too_many_bad_steps_in_a_row(home):
    """After one update with a learning rate beyond reason nothing is finite any more."""
    run = Run(
        home, "tiny.py", "--lr=1e38", "--warmup_steps=0", "--bad_steps=3", "--name=nan", ranks=2
    )
    assert run.wait(grace=2) == [1, 1]
    assert [f"{n} in a row" in run.text() for n in (1, 2, 3, 4)] == [True, True, True, False]
    (message,) = [line for line in run.text().splitlines() if line.startswith("error")]
    step = int(re.search(r"step (\d+), rows (\d+) to (\d+) of corpus", message)[1])
    assert (
        f"rows {4 * step} to {4 * step + 3} of corpus" in message
        and "3 updates in a row were not finite" in message
    )
    assert (
        len(
            re.findall(
                r"[a-z_.0-9]*(?:weight|bias|sinks) (?:nan|inf|[0-9.e+-]+)",
                message.split("gradients:")[1],
            )
        )
        == 5
    )


# ----------------------------------------------------------------------------------------------------------------------
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
    """One message on one of the ranks, no half-written state, and the run can go on from the state before."""
    name = f"full-{prepare.__name__}"
    train(home, "tiny.py", "--steps=4", "--save_every=4", f"--name={name}", ranks=2)
    options = ("tiny.py", "--steps=20", "--save_every=4", f"--name={name}", "--resume=true")
    run = Run(home, *options, ranks=2, prepare=prepare)
    assert run.wait(grace=5) == [1, 1]
    (message,) = [line for line in run.text().splitlines() if line.startswith("error")]
    assert (
        f"cannot save runs/{name}/states/step-00000008" in message and "Traceback" not in run.text()
    )
    assert message.endswith(f"(mend it, then --name={name} --resume=true goes on)")
    assert "File too large" in message or "No space left" in message
    assert states(home / "runs" / name) == ["step-00000004"]
    assert "goes on after step 3\n" in train(home, *options, ranks=2)


def test_full_disk_while_the_weights_are_written(home):
    run = Run(home, "tiny.py", "--steps=2", "--name=full-model", ranks=2, prepare=no_large_files)
    assert run.wait(grace=10) == [1, 1] and run.text().count("\nerror: ") == 1
    assert (
        "error: cannot write runs/full-model/model" in run.text() and "Traceback" not in run.text()
    )
    assert not any("model" in path.name for path in (home / "runs/full-model").iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def config_file(text):
    return lambda folder: (folder / "bad.py").write_text(text)


def corpus(change):
    """A corpus in the folder bad, after change(folder)."""

    def make(folder):
        write_corpus(folder / "bad", rows=20)
        change(folder / "bad")

    return make


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name, size):
    return lambda folder: os.truncate(folder / name, size)


def edit(name, **changes):
    def change(folder):
        (folder / name).write_text(
            json.dumps({**json.loads((folder / name).read_text()), **changes})
        )

    return change


def halve(folder):
    os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size // 2)


def large_token(folder):
    (folder / "tokens.bin").write_bytes(b"\xff\xff\0\0" + (folder / "tokens.bin").read_bytes()[4:])


def zeros(name):
    return lambda folder: (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def weights(change):
    """A checkpoint in the folder bad, after change(folder)."""

    def make(folder):
        shutil.copytree(folder / "runs/base/model", folder / "bad")
        change(folder / "bad")

    return make


def rename_in_index(old, new):
    return lambda folder: (folder / INDEX).write_text(
        (folder / INDEX).read_text().replace(old, new)
    )


def integer_weights(folder):
    from safetensors.torch import load_file, save_file

    path = first_file(folder)
    save_file(
        {
            name: x.to(torch.uint8) if name == "norm.weight" else x
            for name, x in load_file(path).items()
        },
        path,
    )


def larger_vocabulary(folder):
    model = GPTOSS(
        GPTOSSConfig(
            **{
                **json.loads((folder / "runs/base/model/config.json").read_text()),
                "vocab_size": 300,
            }
        )
    )
    model.init_weights()
    model.save_checkpoint(folder / "bad")


def ended(folder):
    shutil.copytree(
        folder / "runs/base", folder / "runs/ended", ignore=shutil.ignore_patterns("states")
    )


def encoded_anew(folder):
    shutil.copytree(folder / "runs/base", folder / "runs/anew")
    for path in (folder / "runs/anew/states").glob("*/state.json"):
        numbers = json.loads(path.read_text())
        numbers["identity"]["tokens in data"] += 1
        path.write_text(json.dumps(numbers))


def run_folder_is_a_file(folder):
    (folder / "runs").mkdir(exist_ok=True)
    (folder / "runs/mine").write_text("")


CHECKPOINT = ["--checkpoint=bad", "--data=corpus", "--seq_len=32"]
THREE_KV_HEADS = ["--num_attention_heads=6", "--num_key_value_heads=3"]
HUGE_HEADER, OPEN_HEADER = b"\xff" * 7 + b"\x7f{}", b"\x08" + bytes(7) + b"{" * 8
AGAIN = [*BASE, "--name=base", "--resume=true"]
FILE = "model-00001-of-00001.safetensors"

BAD = {  # case: (arguments, what is prepared, what the message must say)
    "unknown option": (["tiny.py", "--flavour=1"], None, "no option flavour", "--help"),
    "mistyped option": (["tiny.py", "--warmup_step=3"], None, "warmup_step;", "did you mean warmup_steps"),
    "word for a number": (["tiny.py", "--lr=fast"], None, "--lr=fast", "expected float"),
    "fraction for a whole": (["tiny.py", "--steps=1.5"], None, "--steps=1.5", "expected int"),
    "word for a switch": (["tiny.py", "--resume=yes"], None, "--resume=yes", "true or false"),
    "option without value": (["tiny.py", "--resume"], None, "--resume", "write --name=value"),
    "one dash": (["tiny.py", "-lr=1"], None, "-lr=1", "write --name=value"),
    "no such config": (["none.py"], None, "none.py does not exist", "configs/"),
    "two configs": (["tiny.py", "other.py"], None, "tiny.py other.py", "one config file"),
    "config is no Python": (["bad.py"], config_file("steps = = 3"), "bad.py", "line 1"),
    "config fails": (["bad.py"], config_file("import json\nsteps = 1 / 0"), "bad.py", "division by zero"),
    "config of another type": (["bad.py"], config_file("steps = '9'"), "steps='9'", "must be of type int"),
    "config with a bool": (["bad.py"], config_file("steps = True"), "steps=True", "must be of type int"),
    "config mistyped": (["bad.py"], config_file("batch_sise = 9"), "batch_sise", "did you mean batch_size"),
    "binary config": (["bad.py"], overwrite("bad.py", b"\xff\x00\xfe"), "bad.py", "config file"),
    "zero": (["tiny.py", "--batch_size=0"], None, "batch_size=0", "positive"),
    "nan": (["tiny.py", "--lr=nan"], None, "lr=nan", "positive"),
    "infinite": (["tiny.py", "--lr=inf"], None, "lr=inf", "finite"),
    "negative": (["tiny.py", "--weight_decay=-1"], None, "weight_decay=-1", "zero or positive"),
    "seed": (["tiny.py", "--seed=99999999999999999999"], None, "seed=99999999999999999999", "less than 2147483648"),
    "rope": (["tiny.py", "--rope_theta=1"], None, "rope_theta=1.0", "greater than 1"),
    "long sample": (["tiny.py", f"--sample={'x' * 64}"], None, "sample='xxx", "64 tokens, of which the model takes at most 63"),
    "beta": (["tiny.py", "--beta1=1"], None, "beta1=1", "less than 1"),
    "moments that stand still": (["tiny.py", "--beta2=0.999", "--optimizer=bf16"], None, "beta2=0.999", "optimizer=fp32"),
    "beta2 of split": (["tiny.py", "--beta2=0.999", "--optimizer=split"], None, "beta2=0.999", "optimizer=fp32"),
    "unknown choice": (["tiny.py", "--dtype=fp8"], None, "dtype='fp8'", "choose one of"),
    "run elsewhere": (["tiny.py", "--name=../mine"], None, "../mine", "plain name"),
    "run in the folder above": (["tiny.py", "--name=.."], None, "name='..'", "plain name"),
    "odd head": (["tiny.py", "--head_dim=7"], None, "head_dim=7", "even"),
    "more experts than there are": (["tiny.py", "--experts_per_token=9"], None, "experts_per_token=9", "at most num_experts=4"),
    "heads": (["tiny.py", "--num_key_value_heads=3"], None, "num_key_value_heads=3", "must divide num_attention_heads=4"),
    "sp and ranks": (["tiny.py", "--sp=4"], None, "sp=4", "must divide the number of ranks, 2"),
    "sp, replicas and ranks": (["tiny.py", "--sp=2", "--replicas=2"], None, "replicas=2", "must divide the number of ranks, 2"),
    "sp and length": (["tiny.py", "--sp=2", "--seq_len=31"], None, "sp=2", "must divide seq_len=31"),
    "sp and heads": (["tiny.py", "--sp=2", "--num_attention_heads=3", "--num_key_value_heads=3"], None, "sp=2", "heads=3"),
    "sp and key-value heads": (["tiny.py", "--sp=2", *THREE_KV_HEADS], None, "sp=2", "a multiple"),
    "batch and ranks": (["tiny.py", "--batch_size=3"], None, "batch_size=3", "multiple of 2"),
    "longer than the model": (["tiny.py", "--seq_len=128"], None, "seq_len=128", "64 positions"),
    "seq_len of one": (["tiny.py", "--seq_len=1"], None, "seq_len=1", "2 or more"),
    "offload of all": (["tiny.py", "--offload=true"], None, "recompute=none", "choose recompute=attention or all"),
    "offload without a GPU": (["tiny.py", "--offload=true", "--recompute=all"], None, "offload=True", "needs a GPU"),
    "odd size": (["tiny.py", "--hidden_size=34"], None, "hidden_size=34 must be a multiple of 4", "fp32"),
    "odd size in bf16": (["tiny.py", "--intermediate_size=20", "--dtype=bfloat16"], None, "intermediate_size=20", "of 8"),
    "nothing to evaluate": (["tiny.py", "--eval_every=2", "--eval_data="], None, "eval_every=2", "--eval_data=..."),
    "held-out data of another tokenizer": (
        ["tiny.py", "--data=bad", "--vocab_size=201088"], corpus(edit("meta.json", tokenizer="o200k_harmony")),
        "eval_data=held-out was encoded by bytes", "encode both with one",
    ),
    "data of another vocabulary": (CHECKPOINT, larger_vocabulary, "vocabulary of 257", "checkpoint=bad has one of 300"),
    "no data": (["tiny.py", "--data=none"], None, "none/meta.json", "data.py"),
    "no held-out data": (["tiny.py", "--eval_data=none"], None, "none/meta.json", "data.py"),
    "data cut short": (["tiny.py", "--data=bad"], corpus(truncate("tokens.bin", 100)), "bad/tokens.bin", "100 bytes"),
    "data of uint16": (["tiny.py", "--data=bad"], corpus(halve), "bad/tokens.bin", "encode the corpus again"),
    "token past the vocabulary": (["tiny.py", "--data=bad"], corpus(large_token), "token 65535", "outside bytes's 257"),
    "meta.json": (["tiny.py", "--data=bad"], corpus(overwrite("meta.json", b"{")), "bad/meta.json", "encode the corpus again"),
    "no documents": (["tiny.py", "--data=bad"], corpus(edit("meta.json", documents=0, tokens=0)), "bad/meta.json", "empty"),
    "document ends": (["tiny.py", "--data=bad"], corpus(zeros("documents.bin")), "bad/documents.bin", "must rise"),
    "nothing counted": (["tiny.py", "--data=bad"], corpus(zeros("counted.bin")), "bad", "no target is left"),
    "less data than a batch": (["tiny.py", "--data=held-out", "--batch_size=4000"], None, "data=held-out", "batch_size=4000"),
    "data for a larger vocabulary": (["tiny.py", "--vocab_size=100"], None, "vocab_size=100", "another"),
    "no checkpoint": (CHECKPOINT, None, "bad/config.json does not exist", "convert_hf.py"),
    "checkpoint of Hugging Face": (
        CHECKPOINT, weights(rename_in_index('"embedding.w', '"model.embed_tokens.w')), "Hugging Face's layout", "convert_hf.py bad",
    ),
    "a run for a checkpoint": (
        ["--checkpoint=runs/base", *CHECKPOINT[1:]], None, "is a run's folder", "are in runs/base/model",
    ),
    "sizes beside a checkpoint": ([*CHECKPOINT, "--hidden_size=64"], weights(lambda f: None), "checkpoint=bad", "leave those"),
    "checkpoint cut short": (CHECKPOINT, weights(truncate(FILE, 5000)), FILE, "unreadable"),
    "checkpoint's header": (CHECKPOINT, weights(overwrite(FILE, HUGE_HEADER)), FILE, "unreadable"),
    "checkpoint's header without end": (CHECKPOINT, weights(overwrite(FILE, OPEN_HEADER)), FILE, "unreadable"),
    "checkpoint without a file": (CHECKPOINT, weights(lambda f: (f / FILE).unlink()), FILE, "unreadable"),
    "checkpoint without an index": (CHECKPOINT, weights(lambda f: (f / INDEX).unlink()), INDEX, "convert_hf.py"),
    "index of nonsense": (CHECKPOINT, weights(overwrite(INDEX, b"[" * 100_000)), INDEX, "convert_hf.py"),
    "index that leads out": (CHECKPOINT, weights(rename_in_index(FILE, "../" + FILE)), INDEX, "leads out"),
    "tensor missing": (CHECKPOINT, weights(rename_in_index('"norm.w', '"norm.v')), "missing: norm.weight", "unknown: norm.veight"),
    "another shape": (CHECKPOINT, weights(edit("config.json", hidden_size=48)), "embedding.weight has shape", "(257, 48)"),
    "weights of whole numbers": (CHECKPOINT, weights(integer_weights), "norm.weight", "U8"),
    "a billion layers": (CHECKPOINT, weights(edit("config.json", num_hidden_layers=10**9)), "1000000000 layers", "bad"),
    "config.json of nonsense": (CHECKPOINT, weights(overwrite("config.json", b"GGUF\0")), "bad/config.json", "not a readable"),
    "a run is there": (["tiny.py", "--name=base"], None, "runs/base already holds a run", "--resume=true"),
    "a run that has ended for good": (["tiny.py", "--name=ended", "--resume=true"], ended, "kept no state", "--name=..."),
    "the run's folder is a file": (["tiny.py", "--name=mine"], run_folder_is_a_file, "runs/mine", "another --name"),
    "goes on with other data": ([*AGAIN, "--data=held-out"], None, "data was 'corpus'", "--name"),
    "goes on with a corpus encoded anew": (
        [*BASE, "--name=anew", "--resume=true"], encoded_anew, "tokens in data was", "--name",
    ),
    "goes on with another batch": ([*AGAIN, "--batch_size=8"], None, "batch_size was 4 and is 8", "--name"),
    "goes on with another optimizer": ([*AGAIN, "--optimizer=split"], None, "optimizer was 'fp32'", "--name"),
    "goes on with another model": ([*AGAIN, "--hidden_size=64"], None, "hidden_size was 32", "--name"),
}  # fmt: skip


def files_in(folder):
    return {
        path: path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and "output-" not in path.name
    }


def test_the_documentation_counts_them():
    text = " ".join((ROOT / "docs/training.md").read_text().split())
    assert f"{len(BAD)} kinds of bad input" in text


@pytest.mark.parametrize("case", BAD)
def test_bad_input(home, base, case):
    """One error, from one of two ranks, that names the culprit and the fix; a bad exit code; no file made or changed."""
    arguments, prepare, *words = BAD[case]
    if prepare:
        prepare(home)
    before = files_in(home)
    run = Run(home, *arguments, ranks=2)
    codes, text = run.wait(grace=1), run.text()
    after = files_in(home)
    for path in (home / "bad", home / "bad.py", home / "runs/mine"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert 0 not in codes, text
    assert text.startswith("error: ") and text.count("error: ") == 1 and "Traceback" not in text, (
        text
    )
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1 or "does not fit the model" in text, text
    assert after == before


def test_bad_input_in_a_process_of_its_own(home):
    """As a user meets it."""
    command = [sys.executable, ROOT / "train.py", "tiny.py", "--sp=2"]
    done = subprocess.run(
        command, cwd=home, env=NO_GPU, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: sp=2 times replicas=1 must divide the number of ranks, 1: "
        "start more by torchrun --nproc_per_node, in a dry run by --ranks, or choose a smaller --sp\n"
    )


def test_wandb_is_not_installed(home):
    if __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    run = Run(home, "tiny.py", "--wandb=true", "--name=wandb")
    assert (
        run.wait() == [1]
        and run.text()
        == "error: wandb=True: install it with `pip install wandb`, or leave the option out\n"
    )


def test_a_folder_has_one_run_at_a_time(home):
    run = Run(home, *ENDLESS, "--name=busy").wait_for("step 2 |")
    with pytest.raises(ValueError, match="runs/busy belongs to a run that is still going on"):
        hold(home / "runs/busy", patience=0.3)
    run.kill()
    run.wait()
    hold(home / "runs/busy", patience=5)


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_any_state_json(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("step") / "step-00000001"
    folder.mkdir()
    (folder / "state.json").write_bytes(data)
    assert examine(folder)[0] is None


def test_nothing_unpickles():
    """Files are data: no code of ours reads a pickle."""
    for path in ROOT.glob("*.py"):
        assert not re.search(
            r"torch\.load\b|\bpickle\b|\bmarshal\b|allow_pickle=True|\bshelve\b",
            path.read_text().replace("never pickle", ""),
        ), path
