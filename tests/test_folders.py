"""folders.py: a result is whole or absent, has one writer, and nothing of another's is touched."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import folders
from folders import DAY, Aside, exists, sweep

ROOT = Path(__file__).resolve().parent.parent
WRITER = """
import os, sys, time
sys.path.insert(0, {root!r})
from folders import Aside
with Aside({folder!r}) as aside:
    (aside / "a").write_text(str(os.getpid()))
    {then}
"""


def start(folder, then):
    """A process that is inside Aside(folder), with a file written."""
    code = WRITER.format(root=str(ROOT), folder=str(folder), then=then)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if "ready" in then:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    return process


HANG = "print('ready', flush=True); time.sleep(60)"


def names(folder):
    return sorted(os.listdir(folder))


def leftover(folder, machine, age=0, kind="partial"):
    """What a dead writer of `folder` left on `machine`, `age` seconds ago."""
    path = folder.with_name(f".{folder.name}.{kind}-{machine}-00000000")
    path.mkdir()
    (path / "a").write_text("left")
    for each in (path / "a", path):
        os.utime(each, (time.time() - age,) * 2)
    return path.name


def test_a_folder_appears_when_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, Path.rename

    def record_fsync(handle):
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def record_rename(path, target):
        events.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    with Aside(tmp_path / "deep" / "out") as aside:
        (aside / "sub").mkdir()
        (aside / "a").write_text("a")
        (aside / "sub" / "b").write_text("b")
        assert not (tmp_path / "deep" / "out").exists() and aside.parent == tmp_path / "deep"
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {"a", "b", "sub", aside.name} and after == ["deep"]
    assert names(tmp_path / "deep") == ["out"] and names(tmp_path / "deep" / "out") == ["a", "sub"]
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o777 & ~umask()


def umask():
    value = os.umask(0)
    os.umask(value)
    return value


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), Aside(tmp_path / "out") as aside:
        (aside / "a").write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(sent, tmp_path):
    process = start(tmp_path / "out", HANG)
    process.send_signal(sent)
    process.communicate(timeout=30)
    assert process.returncode in (128 + sent, -sent)
    assert names(tmp_path) == []


def test_a_second_signal_does_not_interrupt_the_cleaning_up(tmp_path):
    slow = (
        "import shutil; remove = shutil.rmtree; shutil.rmtree = lambda *a, **k: "
        "(print('removing', flush=True), time.sleep(1), remove(*a, **k)); "
    )
    process = start(tmp_path / "out", slow + HANG)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "removing\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and names(tmp_path) == []


def test_handlers_of_the_program_stay(tmp_path):
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Aside(tmp_path / "out"):
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGHUP, before[1])
    with Aside(tmp_path / "two"):
        assert callable(signal.getsignal(signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) == before[0] == signal.SIG_DFL


def test_a_forked_child_that_is_told_to_end_cleans_up_nothing(tmp_path):
    then = (
        "child = os.fork() or time.sleep(60); time.sleep(0.5); os.kill(child, 15); "
        "print('forked', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), aside.exists())"
    )
    out, errors = start(tmp_path / "out", then).communicate(timeout=30)
    assert out == "forked -15 True\n", errors
    assert names(tmp_path) == ["out"]


def test_the_second_writer_is_told_so_and_the_first_is_not_disturbed(tmp_path):
    first = start(tmp_path / "out", HANG)
    with pytest.raises(
        ValueError, match=f"out is being written by process {first.pid} on .*: wait"
    ):
        with Aside(tmp_path / "out"):
            raise AssertionError("inside")
    with Aside(tmp_path / "other"):
        pass
    assert len(names(tmp_path)) == 3
    first.kill()
    first.communicate()
    assert len(names(tmp_path)) == 3, "what a killed writer leaves"
    with Aside(tmp_path / "out") as aside:
        assert names(tmp_path) == sorted([".out.lock", aside.name, "other"]), "is removed"
    assert names(tmp_path) == ["other", "out"]


def test_of_many_writers_at_once_one_wins(tmp_path):
    """No mixture: what is there was written by the only one that ended well."""
    for round in range(3):
        folder = tmp_path / str(round) / "out"
        folder.parent.mkdir()
        writers = [start(folder, "time.sleep(0.2)") for _ in range(6)]
        errors = [writer.communicate(timeout=60)[1] for writer in writers]
        won = [writer.pid for writer in writers if writer.returncode == 0]
        assert won == [int((folder / "a").read_text())]
        told = [error.splitlines()[-1] for error in errors if error]
        assert len(told) == 5
        assert all("is being written by" in e or "is not empty" in e for e in told), told
        assert names(folder.parent) == ["out"]


def test_threads_are_writers_too(tmp_path):
    """The lock holds within a process, and begin() and publish() may run in different threads."""
    work = Aside(tmp_path / "out")
    (work.begin() / "a").write_text("mine")
    with pytest.raises(ValueError, match=f"being written by process {os.getpid()} "):
        Aside(tmp_path / "out").begin()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work.publish).result()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_leftovers_of_dead_writers(tmp_path):
    """Those of this machine go: the lock says that their writer is dead. Others' go after a day."""
    out, here = tmp_path / "out", folders.machine()
    gone = [leftover(out, here), leftover(out, "12345678", age=DAY + 60)]
    stays = [
        leftover(out, "87654321", age=DAY - 60),
        leftover(tmp_path / "out2", here),
        leftover(tmp_path / "out.partial", here),
        leftover(tmp_path / "o", here),
    ]
    (tmp_path / ".out.partial").mkdir()  # of an older version: its age decides
    (tmp_path / ".out.partial-mine").mkdir()  # not a name that we give
    with Aside(out):
        assert not any((tmp_path / name).exists() for name in gone)
    expected = sorted([*stays, ".out.partial", ".out.partial-mine", "out"])
    assert names(tmp_path) == expected
    held = Aside(tmp_path / "out2")
    held.lock = folders.take_lock(held.folder)
    sweep(tmp_path, "out*")
    assert names(tmp_path) == sorted(set(expected) - {stays[2]} | {".out2.lock"})
    held.discard()
    sweep(tmp_path)
    assert names(tmp_path) == sorted([stays[0], ".out.partial", ".out.partial-mine", "out"])
    sweep(tmp_path / "absent")


def test_an_older_folder_gives_way_only_when_told_to(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with Aside(out) as aside:  # an empty one may be filled
        (aside / "a").write_text("old")
    for occupied in (out, out / "a"):
        with pytest.raises(ValueError, match=f"{occupied} exists and is not empty"):
            Aside(occupied).begin()
    with Aside(out, replace=True) as aside:
        (aside / "b").write_text("new")
        assert names(out) == ["a"]
    assert names(out) == ["b"] and names(tmp_path) == ["out"]


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="not empty"), Aside(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["precious"]


def test_a_failing_rename_gives_the_older_folder_its_name_back(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename
    with Aside(out) as aside:
        (aside / "a").write_text("old")

    def fail(path, target):
        if ".partial" in path.name:
            raise OSError(errno.EIO, "input/output error")
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="input/output"):
        patch.setattr(Path, "rename", fail)
        with Aside(out, replace=True) as aside:
            (aside / "b").touch()
    assert names(tmp_path) == ["out"] and names(out) == ["a"]
    # killed between the two renames: the next writer gives the older one its name back first
    out.rename(tmp_path / f".out.old-{folders.machine()}-00000000")
    with pytest.raises(ZeroDivisionError), Aside(out, replace=True):
        raise ZeroDivisionError
    assert names(tmp_path) == ["out"] and names(out) == ["a"]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")
    with Aside(tmp_path / "out", replace=True) as aside:
        assert aside.parent == tmp_path / "disk"
        (aside / "a").touch()
    assert (tmp_path / "out").is_symlink() and names(tmp_path / "disk") == ["real"]
    assert names(tmp_path / "out") == ["a"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    """Names are unique there too. Nothing is removed: nobody can tell whether its writer lives."""

    def flock(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    left = leftover(tmp_path / "out", folders.machine())
    with pytest.raises(ValueError, match="not empty"), Aside(tmp_path / "out") as a:
        (a / "a").write_text("first to begin")
        with Aside(tmp_path / "out") as b:
            (b / "a").write_text("first to end")
    assert names(tmp_path) == [left, "out"]
    assert (tmp_path / "out" / "a").read_text() == "first to end"
    sweep(tmp_path)
    assert names(tmp_path) == [left, "out"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ELOOP])
def test_what_cannot_be_examined_is_not_absent(number, tmp_path, monkeypatch):
    assert exists(tmp_path) and not exists(tmp_path / "no")
    (tmp_path / "file").touch()
    assert not exists(tmp_path / "file" / "below")

    def stat(path):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=os.strerror(number)):
        patch.setattr(os, "stat", stat)
        exists(tmp_path / "no")
