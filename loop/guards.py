"""What keeps a long run safe: it stops when asked, has its folder to itself, notices lost ranks,
and ends with one message when one rank fails."""

import atexit
import fcntl
import json
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

PULSE = 1  # seconds between beats
ROLL_CALL = 4  # seconds in which a living rank has a pulse

# Seconds by which the timeout of the process groups is longer than Watch's, so that a lost rank is
# reported by Watch's one line, and not by NCCL's watchdog, which aborts all ranks with pages of its
# own. Watch needs the beats in which it counts (2), the connection to the store (12, if a name
# server is silent), and the roll call (4).
TIME_TO_REPORT = 30


class Stop:
    """`asked` becomes true on SIGTERM or SIGUSR1, which schedulers send, on Ctrl-C, and when
    torchrun is gone: finish the step, save, leave. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signalled = False
        # A handler in Python waits until the main thread has left PyTorch; a thread that reads the
        # signals' numbers from a socket does not.
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(self.mouth.fileno())
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while number := self.ear.recv(1):
            if self.signalled and number[0] == signal.SIGINT:
                os._exit(128 + signal.SIGINT)
            asking = number[0] in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            self.signalled = self.signalled or asking

    @property
    def asked(self):
        return self.signalled or is_orphan()


LAUNCHER = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def is_orphan():
    """Whether the torchrun that started this rank is gone: a rank without it has a new parent."""
    return LAUNCHER not in (None, os.getppid())


def hold(folder, patience=10):
    """Make `folder` this process's own until it ends, however it ends. ValueError if it belongs to
    another process for `patience` seconds, which a killed run may take to vanish."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder} is in use by a run that is still going: stop it, or choose "
                    "another --name"
                ) from None
            time.sleep(0.2)
        except OSError:
            return None  # some network file systems have no locks


# --------------------------------------------------------------------------------------------------
# The store in which ranks meet, and their pulses in it


def torchrun_store(seconds=12):
    """The key-value store of torchrun, or of the first rank once it runs; None if it cannot be
    reached. Connecting looks up a name: 12 seconds outlast a name server that is silent twice."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        return None
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds))
    except (KeyError, RuntimeError):
        return None


def attempt():
    """torchrun keeps one store for all restarts of a run. What a failed attempt left there would
    mislead the next one, so each attempt has keys of its own."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def meeting_point(seconds):
    """Arguments for init_process_group: where the ranks meet."""
    if "RANK" not in os.environ:
        return {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    if store := torchrun_store(seconds):
        return {
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
            "store": dist.PrefixStore(f"attempt/{attempt()}", store),
        }
    return {}


def pulse_key(rank):
    return f"pulse/{attempt()}/{rank}"


def failures_key():
    """Under this key the store counts the ranks that have failed."""
    return f"said/{attempt()}"


def roll_call(store):
    """The ranks that have no pulse in ROLL_CALL seconds. This one beats meanwhile, because the
    caller may be the thread that beats for it."""
    keys = [pulse_key(rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
    before = [store.add(key, 0) for key in keys]
    for _ in range(ROLL_CALL):
        store.add(pulse_key(os.environ["RANK"]), 1)
        time.sleep(1)
    return [rank for rank, key in enumerate(keys) if store.add(key, 0) == before[rank]]


class Watch:
    """A thread that counts in the store, every PULSE seconds and whatever the other threads wait
    for, and watches that the next rank does the same.

    The process ends, with a message, when the next rank has been silent for `timeout` seconds and
    then misses a roll call, whatever is waited for; and when torchrun is gone before the loop asks
    Stop about it.

    Once a stop was asked, ROLL_CALL seconds of silence are enough, and the process also ends when
    another rank has failed. For torchrun asks all ranks to stop when it has lost one: they may wait
    for it inside NCCL, which nothing interrupts, and torchrun kills them after 30 s."""

    def __init__(self, options):
        self.options, self.ended, self.stop = options, threading.Event(), None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        # Python, as it ends, would stop the thread inside PyTorch's C++, which aborts the process.
        atexit.register(self.end)

    def run(self):
        if "RANK" not in os.environ:
            return
        rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, gone = None, False
        neighbour, failed = (rank + 1) % ranks, 0  # failed: beats since another rank has
        heard, silent = None, 0  # counted in beats: a suspended job hears nothing and is not lost
        while not self.ended.wait(PULSE):
            if is_orphan() and self.stop is None:
                if os.environ["LOCAL_RANK"] == "0":
                    print("error: torchrun is gone, before the first step", file=sys.stderr)
                os._exit(1)
            store = store or (None if gone else torchrun_store())
            if store is None:
                continue
            asked, lost = self.stop is not None and self.stop.asked, []
            try:
                store.add(pulse_key(rank), 1)
                pulse = store.add(pulse_key(neighbour), 0)
                heard, silent = pulse, 0 if pulse != heard else silent + PULSE
                if silent > (ROLL_CALL if asked else self.options.timeout):
                    lost = roll_call(store)
                failed += asked and store.add(failures_key(), 0) > 0
            except RuntimeError:
                store, gone = None, True
                continue
            if self.ended.is_set():
                break
            if neighbour in lost:
                fail(dist.DistError(f"no pulse for {silent} s"), self.options, lost)
            if failed > 1:  # for a beat, in which this rank may say what failed here
                fail(dist.DistError("another rank has failed"), self.options, [])

    def end(self):
        self.ended.set()
        self.thread.join(2 * ROLL_CALL)  # no longer, should the store hang


# --------------------------------------------------------------------------------------------------
# The end of a run that failed


def fail(error, options, silent=None, lacking=()):
    """Say what went wrong and end this rank at once: a thread that waits for other ranks must not
    keep it alive. One line for what the user can fix, a traceback for a bug. If ranks fail alike,
    one of them speaks. `silent`: the ranks that missed a roll call, if there was one; `lacking`:
    options that this program does not have."""
    store = torchrun_store()
    from_gloo = isinstance(error, RuntimeError) and "gloo" in str(error)
    lost = isinstance(error, dist.DistError) or from_gloo
    first_line = (str(error).splitlines() or [""])[0]
    if lost:
        text = f"error: {describe_lost(store, silent) if store else 'another rank died or hangs'}"
        text += f" ({first_line})"
    elif out_of_memory(error):
        rank = os.environ.get("RANK", 0)
        text = f"error: rank {rank}: {first_line}\n{memory_advice(options, lacking)}"
    elif isinstance(error, (ValueError, OSError, FloatingPointError)):
        text = f"error: {error}"
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    if first_to_say("" if lost else text, store):
        with suppress(OSError):
            print(text, file=sys.stderr)
    tell_torchrun(text)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(1)


def out_of_memory(error):
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or refused


def tell_torchrun(text):
    """torchrun prints some thirty lines of its own after ours; this puts ours at their end too."""
    with suppress(OSError, KeyError):
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        report = {"message": {"message": text, "extraInfo": extra}}
        with open(os.environ["TORCHELASTIC_ERROR_FILE"], "w") as file:
            json.dump(report, file)


def first_to_say(text, store):
    """True if this rank is the first to report `text`, or, for an empty text, to report at all."""
    if store is None:  # before they meet, ranks fail alike
        first = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        return dist.is_initialized() or first
    others = store.add(failures_key(), 1) - 1
    return store.add(f"{failures_key()}/{text}", 1) == 1 if text else others == 0


def describe_lost(store, silent=None):
    """Which ranks have no pulse: those in `silent`, or those that miss a roll call now."""
    try:
        silent = roll_call(store) if silent is None else silent
    except RuntimeError:
        silent = [0]  # which kept the store
    names = ", ".join(map(str, silent))
    return f"rank {names} died or hangs" if silent else "ranks lost each other"


def memory_advice(options, lacking=()):
    """The options that can still save memory, in the order of docs/training.md."""
    ranks = int(os.environ.get("WORLD_SIZE", options.ranks if options.rehearse else 1))
    adapters, targets = options.lora_rank > 0, options.lora_targets
    # adapters on attention are too few for their optimizer to matter
    large = any(name in targets for name in ("experts", "gate_up", "down", "all", "embedding"))
    fp32 = options.optimizer == "fp32"
    advice = [
        (options.keep_blocks > 0 and options.recompute != "none", "a smaller --keep_blocks"),
        (options.recompute == "none", "--recompute=attention"),
        (options.micro_batch > 1, "a smaller --micro_batch"),
        (adapters and options.frozen == "bf16", "--frozen=mxfp4 (on a base imported --packed)"),
        (adapters and not options.shard_frozen and ranks > options.replicas, "--shard_frozen"),
        (options.sp < ranks, "a larger --sp"),
        (fp32 and (large or not adapters), "--optimizer=split (10 bytes per parameter, not 16)"),
        (
            not options.offload and "offload" not in lacking,
            "--offload --keep_blocks=0 (blocks' inputs to host memory)",
        ),
        (options.recompute != "all", "--recompute=all"),
        (True, "a larger --sp over more GPUs, or a shorter --seq_len"),
    ]
    return "out of memory: try " + ", then ".join(text for applies, text in advice if applies)


def describe_bad_step(model, at, options):
    """The batch and the parameters with numbers that are not finite, for whoever looks for the
    cause."""
    norms = {
        name: p.grad.norm().full_tensor().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    norms = dict(sorted(norms.items(), key=lambda item: -item[1] if item[1] < math.inf else -1e99))
    largest = ", ".join(f"{name} {norm:.3g}" for name, norm in list(norms.items())[:5])
    first = at.step * options.batch_size
    return (
        f"{at.skipped} updates in a row were not finite; step {at.step}, sequences {first} to "
        f"{first + options.batch_size - 1} of {options.data}; largest gradients: {largest}"
    )
