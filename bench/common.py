"""What all measurements share: the device, the model that stands in where there is no GPU, clocks,
failures."""

import gc
import statistics
import time

import torch

from model import GPTOSSConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
K, GIB = 1024, 2**30
LONG = 64 * K  # from here on a step takes seconds: timed once, and attention's rate is constant
TINY = GPTOSSConfig(
    num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=512, hidden_size=64,
    intermediate_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2,
    sliding_window=16,
)  # fmt: skip


def random(*shape):
    """Not zeros: those take less power, and run faster."""
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def random_tokens(config, S):
    generator = torch.Generator(DEVICE).manual_seed(0)
    return torch.randint(config.vocab_size, (1, S), device=DEVICE, generator=generator)


def synchronize():
    if GPU:
        torch.cuda.synchronize()


def seconds(run, prepare=tuple, repetitions=5):
    """Median time of run(*prepare()), without prepare(), after one call that does not count.

    Before each call the GPU overwrites a GiB: its caches then hold nothing useful, and Python has
    time to queue the call."""
    times, scratch = [], torch.empty(GIB if GPU else 0, dtype=torch.uint8, device=DEVICE)
    for _ in range(repetitions + 1):
        arguments = prepare()
        if GPU:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            scratch.zero_()
            start.record()
            run(*arguments)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            run(*arguments)
            times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def release():
    """Return memory that nothing refers to any more to the driver."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()


def out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


def attempt(run, *arguments):
    """run(*arguments), a dict; if it fails {"error": why, in one line}. Either way its memory is
    released."""
    try:
        return run(*arguments)
    except Exception as error:
        if out_of_memory(error):
            return {"error": "out of memory"}
        why = (str(error).strip() or "no message").splitlines()[0][:160]
        return {"error": f"{type(error).__name__}: {why}"}
    finally:
        release()
