import os
import shutil
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# tests start up to eight ranks: more threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

# In the background a shell ignores these, which the processes that the tests start would inherit
for number, action in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, action)

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption(
        "--slow",
        action="store_true",
        help="also run the tests that take long: kills, lost nodes, the soak",
    )


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes long: --slow runs it"))


@pytest.fixture(scope="module")
def base(home):
    """The name of a run in `home`, which a test file makes: 12 steps on two ranks, whose states
    after 4, 8 and 12 are kept."""
    from runs import BASE, train  # which imports this file

    train(home, *BASE, "--name=base", ranks=2)
    return "base"


@pytest.fixture
def copy(home, base):
    """A copy of that run: its folder."""
    folder = home / "runs" / f"{base}-{os.urandom(4).hex()}"
    shutil.copytree(home / "runs" / base, folder)
    return folder
