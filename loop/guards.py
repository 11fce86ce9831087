"""What keeps a long run safe, each called by its name in train.py: it stops politely, it has its folder to itself, and when one
rank fails they all end, with one message."""

import atexit
import fcntl
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
from pathlib import Path

import torch
import torch.distributed as dist

PULSE = 1  # seconds from beat to beat
ROLL_CALL = 4  # seconds in which a rank that lives has a pulse


class Stop:
    """`asked` is set by SIGTERM and SIGUSR1, which schedulers send, by Ctrl-C, and by the end of torchrun: finish the step, save,
    leave. A second Ctrl-C ends the process at once."""

    def __init__(self):
        self.signalled, self.launcher = (
            False,
            os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None,
        )
        self.ear, self.mouth = socket.socketpair()
        self.mouth.setblocking(False)
        signal.set_wakeup_fd(
            self.mouth.fileno()
        )  # a handler in Python waits until the main thread has left PyTorch
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self):
        while number := self.ear.recv(1):
            if self.signalled and number[0] == signal.SIGINT:
                os._exit(128 + signal.SIGINT)
            self.signalled = self.signalled or number[0] in (
                signal.SIGTERM,
                signal.SIGUSR1,
                signal.SIGINT,
            )

    @property
    def asked(self):
        return self.signalled or self.launcher not in (
            None,
            os.getppid(),
        )  # a rank without its torchrun has a new parent


def hold(folder, patience=10):
    """Make `folder` this process's own until it ends, however it ends. ValueError if for `patience` seconds, which a killed run
    may take to vanish, it is another's."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{folder} belongs to a run that is still going on: stop it, or choose another --name"
                ) from None
            time.sleep(0.2)
        except OSError:
            return None  # some network file systems have no locks


# ----------------------------------------------------------------------------------------------------------------------
# The end of a run that failed


def fail(error, options):
    """Say what went wrong, in one line if it is the user's to mend and as a traceback if not, and end this rank at once: a thread
    that waits for other ranks must not keep it alive. Of ranks that fail alike one speaks."""
    store = torchrun_store()
    lost = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )
    if lost:
        text = f"error: {describe_lost(store) if store else 'another rank died or hangs'} ({str(error).splitlines()[0]})"
    elif isinstance(error, torch.OutOfMemoryError):
        text = f"error: rank {os.environ.get('RANK', 0)}: {str(error).splitlines()[0]}\n{memory_advice(options)}"
    elif (
        isinstance(error, OSError)
        and options
        and any(Path("runs", options.name, "states").glob("step-*"))
    ):
        text = f"error: {error} (mend it, then --name={options.name} --resume=true goes on)"
    elif isinstance(error, (ValueError, OSError, FloatingPointError)):
        text = f"error: {error}"
    else:
        text = "".join(traceback.format_exception(error)).rstrip()
    if first_to_say("" if lost else text, store):
        print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def first_to_say(text, store):
    """Whether no other rank has said this; and of the empty text, whether none has said anything."""
    if store is None:
        return (
            dist.is_initialized() or os.environ.get("LOCAL_RANK", "0") == "0"
        )  # before they meet, ranks fail alike
    said = "said/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    others = store.add(said, 1) - 1
    return store.add(f"{said}/{text}", 1) == 1 if text else others == 0


def torchrun_store(seconds=12):
    """The key-value store through which ranks met, kept by torchrun, or by the first rank once it runs. None if out of reach.
    PyTorch looks up names as it connects: 12 seconds outlast a name server that is silent twice."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and not dist.is_initialized():
        return None
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=seconds))
    except (KeyError, RuntimeError):
        return None


def meeting_point(seconds):
    """For init_process_group: where the ranks meet. torchrun keeps one store for all restarts of a run, in which what a failed
    attempt left would mislead the next one: each has keys of its own."""
    if "RANK" not in os.environ:
        return {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    if store := torchrun_store(seconds):
        store = dist.PrefixStore(
            "attempt/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store
        )
        return {
            "rank": int(os.environ["RANK"]),
            "world_size": int(os.environ["WORLD_SIZE"]),
            "store": store,
        }
    return {}


def pulse_key(rank):
    return f"pulse/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def keep_pulse():
    """Count in the store, every PULSE seconds, from a thread that runs whatever the others wait for."""
    ended = threading.Event()

    def beat(store, key):
        with suppress(RuntimeError):  # there is no store any more
            while not ended.wait(PULSE):
                store.add(key, 1)

    def end():
        ended.set()
        thread.join(ROLL_CALL)  # no longer, should the store hang

    if store := torchrun_store():
        thread = threading.Thread(
            target=beat, args=(store, pulse_key(dist.get_rank())), daemon=True
        )
        thread.start()
        atexit.register(
            end
        )  # or Python, as it ends, stops the thread inside PyTorch's C++, which aborts the process


def describe_lost(store):
    """Which ranks have no pulse, from a rank of which a collective operation failed."""
    try:
        keys = [pulse_key(rank) for rank in range(int(os.environ["WORLD_SIZE"]))]
        before = [store.add(key, 0) for key in keys]
        time.sleep(ROLL_CALL)
        silent = [str(rank) for rank, key in enumerate(keys) if store.add(key, 0) == before[rank]]
    except RuntimeError:
        silent = ["0"]  # which kept the store
    return f"rank {', '.join(silent)} died or hangs" if silent else "ranks lost each other"


def memory_advice(options):
    """The options that still have memory to give, the cheapest first."""
    advice = [
        (options.keep_blocks > 0 and options.recompute != "none", "a smaller --keep_blocks"),
        (options.recompute == "none", "--recompute=attention"),
        (options.micro_batch > 1, "a smaller --micro_batch"),
        (options.optimizer == "fp32", "--optimizer=split (10 bytes a parameter instead of 16)"),
        (not options.offload, "--offload=true --keep_blocks=0 (blocks' inputs to host memory)"),
        (options.recompute == "attention", "--recompute=all"),
        (True, "a larger --sp over more GPUs, or a shorter --seq_len"),
    ]
    return "out of memory: try " + ", then ".join(text for applies, text in advice if applies)


def describe_bad_step(model, step, options):
    """Which batch and which parameters have the numbers that are not finite, for the one who looks for the cause."""
    norms = {
        name: p.grad.norm().full_tensor().item()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    worst = sorted(
        norms.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf
    )[:5]
    rows = f"rows {step * options.batch_size} to {(step + 1) * options.batch_size - 1} of {options.data}"
    return (
        f"{options.bad_steps} updates in a row were not finite; step {step}, {rows}; largest gradients: "
        + ", ".join(f"{name} {norm:.3g}" for name, norm in worst)
    )
