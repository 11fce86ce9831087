"""Train a tiny model for minutes while it is killed at random moments, and see that nothing is
lost, grows or stays behind.

    python tests/soak.py             # ten minutes
    python tests/soak.py --minutes=1

One run goes on undisturbed for half of the time, and its memory is measured. The other one saves
every few steps, is killed (SIGKILL, all ranks at once) and resumed. At the end both must have the
same losses, step by step.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from runs import Run, losses, make_home, states  # noqa: E402

OPTIONS = ("tiny.py", "--sp=2", "--steps=1000000", "--eval_every=20", "--log_every=10")


def resident(process):
    """Bytes of memory that a process has."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def steady(home, seconds):
    """The run that is left alone. Returns its resident memory in the first and in the last third of
    the time, in bytes."""
    run = Run(home, *OPTIONS, "--save_every=20", "--name=steady", ranks=2)
    # evaluated, drawn and saved twenty times: all that is imported is there, and the allocator,
    # which takes more for some 350 steps, has settled
    run.wait_for(r"step +399 \|", timeout=300)
    deadline, sizes = time.monotonic() + seconds, []
    while time.monotonic() < deadline:
        sizes.append(max(map(resident, run.processes)))
        time.sleep(0.1)
    run.kill(ranks=[1], number=15)  # asks to stop
    run.ends_well()
    third = len(sizes) // 3
    return max(sizes[:third]), max(sizes[-third:])


def killed(home, seconds, generator):
    """The run that is killed and resumed. Returns how often it was killed, and how often while it
    saved."""
    deadline, kills, in_saves = time.monotonic() + seconds, 0, 0
    options = (*OPTIONS, "--save_every=5", "--name=killed", "--resume")

    def saving():
        return any((home / "runs/killed/states").glob(".step-*.partial*"))

    while time.monotonic() < deadline:
        run = Run(home, *options, ranks=2)
        end = time.monotonic() + generator.uniform(0, min(20, seconds / 3))
        while time.monotonic() < end:
            if generator.random() < 0.02 and saving():
                break
            time.sleep(0.01)
        in_saves += saving()
        run.kill()
        run.wait()
        kills += 1
    run = Run(home, *options, ranks=2).wait_for("stalled")
    run.kill(ranks=[0], number=15)
    run.ends_well()
    return kills, in_saves


def soak(home, seconds, seed=0):
    """Run both for half of the time each. AssertionError for what is wrong; returns the report."""
    make_home(home)
    early, late = steady(home, seconds / 2)
    kills, in_saves = killed(home, seconds / 2, random.Random(seed))
    undisturbed, disturbed = losses(home, "steady"), losses(home, "killed")
    common = min(len(undisturbed), len(disturbed))
    assert undisturbed[:common] == disturbed[:common], "the losses differ"
    memory = f"{early / 2**20:.1f} MiB early and {late / 2**20:.1f} MiB late"
    assert late < early * 1.02 + 2**20, f"memory grew: {memory}"
    for name, every in (("steady", 20), ("killed", 5)):
        files = {path.name for path in (home / "runs" / name).iterdir()}
        files -= {"loss.png"}  # which only matplotlib draws
        assert files == {"config.json", "metrics.jsonl", "states"}, files
        last, steps = states(home, name), len(losses(home, name))
        right = len(last) <= 2 and last[-1] == f"step-{steps:08d}"
        assert right, f"states {last} after {steps} steps, saved every {every}"
    return (
        f"{len(undisturbed)} steps undisturbed, memory {memory}; {kills} kills, {in_saves} while "
        f"saving, {len(disturbed)} steps, the same {common} losses; no file left behind"
    )


def main():
    parser = argparse.ArgumentParser(
        description="Kill a tiny run at random moments for minutes.", allow_abbrev=False
    )
    parser.add_argument("--minutes", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), 60 * options.minutes, options.seed))


if __name__ == "__main__":
    main()
