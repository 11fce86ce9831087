"""Folders that appear when they are whole.

A result is written to a working folder beside its destination and gets its name once every byte
is on the disk. A process that fails leaves nothing. One that is killed leaves its working folder,
which the next writer of the same result removes.
"""

import contextlib
import fcntl
import fnmatch
import os
import platform
import re
import secrets
import shutil
import signal
import threading
import time
import uuid
import zlib
from pathlib import Path

DAY = 24 * 3600  # seconds


def exists(path):
    """False only if nothing has this name. OSError for what cannot be examined."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def refuse_occupied(folder):
    """ValueError if `folder` is a file, or a folder with something in it."""
    try:
        occupied = bool(os.listdir(folder))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        occupied = True
    if occupied:
        raise ValueError(f"{folder} exists and is not empty: remove it, or choose another --out")


def sync(path):
    """Return when a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Aside:
    """`with Aside(folder) as aside:` write to `aside`, which becomes `folder` if the block succeeds
    and is removed if it raises.

    replace: `folder` may exist and gives way; otherwise it must be absent or empty. If `folder` is
    a link, its target is written. ValueError if another process is writing `folder`, OSError if
    it cannot be written.

    Inside the block SIGTERM and SIGHUP raise SystemExit, so that they clean up as Ctrl-C does.
    Without `with`: begin(), then publish() or discard(), from any thread; signals are then the
    caller's business."""

    def __init__(self, folder, replace=False):
        self.folder, self.replace = Path(os.path.realpath(folder)), replace
        self.aside = self.lock = None

    def begin(self):
        """Take the lock and return the path of the new, empty working folder."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.lock = take_lock(self.folder)
        try:
            if not self.replace:
                refuse_occupied(self.folder)
            if self.lock is not None:
                remove_leftovers(self.folder)
            self.aside = hidden(self.folder, "partial")
            self.aside.mkdir()
        except BaseException:
            self.discard()
            raise
        return self.aside

    def publish(self):
        """Give the finished working folder its name. If that fails, an older folder keeps it."""
        for path in (*self.aside.rglob("*"), self.aside):
            sync(path)
        old = None
        if self.replace and exists(self.folder):
            old = hidden(self.folder, "old")
            self.folder.rename(old)
        elif not self.replace:
            refuse_occupied(self.folder)
        try:
            self.aside.rename(self.folder)
        except BaseException:
            if old:
                old.rename(self.folder)
            raise
        sync(self.folder.parent)
        if old:
            shutil.rmtree(old, ignore_errors=True)
        self.discard()

    def discard(self):
        """Remove the working folder, if it is still one, and release the lock."""
        if self.aside:
            shutil.rmtree(self.aside, ignore_errors=True)
        if self.lock is not None:
            release(self.folder, self.lock)
        self.aside = self.lock = None

    def __enter__(self):
        self.signals = contextlib.ExitStack()
        with self.signals:
            self.signals.enter_context(signals_as_exceptions())
            aside = self.begin()
            self.signals = self.signals.pop_all()
        return aside

    def __exit__(self, kind, *_):
        with self.signals:
            try:
                if kind is None:
                    self.publish()
            finally:
                self.discard()


@contextlib.contextmanager
def signals_as_exceptions():
    """SIGTERM and SIGHUP raise SystemExit in the main thread, unless the program already handles or
    ignores them."""
    owner, numbers = os.getpid(), []

    def stop(number, frame):
        if os.getpid() != owner:  # a forked child: the work is not its own to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for each in numbers:  # a second signal must not interrupt the cleaning up
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:
                numbers.append(number)
                signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


# --------------------------------------------------------------------------------------------------
# Who owns a working folder: whoever holds the lock of its destination


def machine():
    """Eight hexadecimal digits, new whenever a machine boots: within it a lock can be trusted."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # macOS
        name = f"{platform.node()} {uuid.getnode()}"
    return f"{zlib.crc32(name.encode()):08x}"


def hidden(folder, kind):
    """A new name beside `folder`: for its working folder ("partial"), or for the folder that gives
    way ("old")."""
    return folder.with_name(f".{folder.name}.{kind}-{machine()}-{secrets.token_hex(4)}")


def take_lock(folder):
    """The open and locked file `.NAME.lock` beside `folder`. ValueError if another process has it.

    None on a file system without locks: names are unique there too, and nothing is overwritten."""
    path = folder.with_name(f".{folder.name}.lock")
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 200).decode(errors="replace") or "another process"
            os.close(handle)
            raise ValueError(
                f"{folder} is being written by {holder}: wait until it ends, or choose another name"
            ) from None
        except OSError:
            os.close(handle)
            os.unlink(path)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.truncate(handle, 0)
                os.write(handle, f"process {os.getpid()} on {platform.node()}".encode())
                return handle
        os.close(handle)  # its holder was just removing it: again


def release(folder, handle):
    with contextlib.suppress(OSError):
        os.unlink(folder.with_name(f".{folder.name}.lock"))  # before the lock goes: see take_lock
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_UN)  # forked children may still hold the file open
    os.close(handle)


def remove_leftovers(folder):
    """Remove what dead writers of `folder` left. The caller holds its lock.

    Not every network file system carries locks from one machine to another, so what another machine
    made stays until nothing in it has changed for a day. A folder that gave way to one that never
    came gets its name back."""
    pattern = re.compile(
        rf"\.{re.escape(folder.name)}\.(partial|old)(-([0-9a-f]{{8}})-[0-9a-f]{{8}})?"
    )
    try:
        paths = sorted(folder.parent.iterdir())
    except OSError:  # a folder that may be written and not listed
        return
    for path in paths:
        if not (found := pattern.fullmatch(path.name)):
            continue
        if found[3] != machine() and time.time() - last_change(path) < DAY:
            continue
        if found[1] == "old" and not exists(folder):
            path.rename(folder)
        else:
            shutil.rmtree(path, ignore_errors=True)


def last_change(path):
    """When anything in a folder last changed, in seconds; now, if it cannot be told."""
    try:
        return max(os.lstat(p).st_mtime for p in (path, *path.rglob("*")))
    except OSError:
        return time.time()


def sweep(parent, name="*"):
    """Remove what dead writers left in `parent`, for destinations that match the pattern `name`."""
    parent = Path(os.path.realpath(parent))
    left = re.compile(r"\.(.+)\.(partial|old)(-[0-9a-f]{8}-[0-9a-f]{8})?")
    found = [left.fullmatch(path.name) for path in parent.iterdir()] if exists(parent) else []
    for destination in {match[1] for match in found if match and fnmatch.fnmatch(match[1], name)}:
        folder = parent / destination
        with contextlib.suppress(ValueError):  # it is being written
            lock = take_lock(folder)
            if lock is not None:
                remove_leftovers(folder)
                release(folder, lock)
