"""Which runs: a definition of model.py or its fast twin in fast.py.

    @faster(fast.experts)                      # runs in the place of this definition...
    def experts(x, ...):

    with fast.plain():                         # ...except here: the model as model.py states it
        model(tokens, targets).backward()
    with fast.plain("experts", "mean_loss"):   # only these two as stated

Pairs are recorded in PAIRS, so that no pair can lack a test. The rest of the project takes these
names from fast.py.
"""

import functools
import os
from contextlib import contextmanager

import torch

PAIRS = {}  # definition's name: (definition, twin)
SWITCHES = set()  # everything that can be switched off: pairs, compiled leaves, cuDNN
_off = frozenset()  # what is switched off now


@contextmanager
def plain(*names):
    """`with plain():` the model runs as defined, differentiated by autograd: slow, and the truth.

    With names out of SWITCHES only those are switched off. ValueError for another name."""
    if unknown := set(names) - SWITCHES:
        raise ValueError(f"plain: {', '.join(sorted(unknown))}: not in {sorted(SWITCHES)}")
    with _switched_off(_off | (set(names) or SWITCHES)):
        yield


@contextmanager
def _switched_off(names):
    global _off
    before, _off = _off, names
    try:
        yield
    finally:
        _off = before


def is_on(name):
    """Whether the twin or leaf `name` is in use, not switched off by `plain`."""
    return name not in _off


def as_now():
    """Returns a function that makes a context in which the switches are set as they are now: a
    replay in the backward then runs what the forward ran, even after `plain()` has ended."""
    return functools.partial(_switched_off, _off)


def faster(twin):
    """Decorate a definition: `twin`, of the same signature, runs in its place. A twin that cannot
    do a case returns `declined(...)`, and the definition runs."""

    def decorate(definition):
        name = definition.__name__
        PAIRS[name] = definition, twin
        SWITCHES.add(name)

        @functools.wraps(definition)
        def call(x, *args):
            if name in _off:
                return definition(x, *args)
            if torch.is_autocast_enabled(x.device.type):
                result = declined(name, "torch.autocast is on; model.bfloat16() needs no autocast")
            elif x.dtype == torch.float64:
                result = declined(name, "the fast twin computes in fp32, and the model is in fp64")
            else:
                result = PAIRS[name][1](x, *args)
            return definition(x, *args) if result is NotImplemented else result

        return call

    return decorate


@functools.cache
def say(message):
    """Print a message once, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def declined(name, reason):
    """What a twin returns when its definition has to run instead; the reason is printed once."""
    say(f"{name}: plain PyTorch, because {reason}")
    return NotImplemented


def differentiable_gradients(name, inputs, grad):
    """The gradients of a definition's inputs, themselves differentiable: for create_graph=True,
    which a written-out backward cannot serve. None for inputs that need no gradient."""
    declined(name, "a second derivative was requested")
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    out = PAIRS[name][0](*inputs)
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return tuple(next(found) if torch.is_tensor(x) and x.requires_grad else None for x in inputs)


# --------------------------------------------------------------------------------------------------
# Compiled leaves

# FlexAttention is specialised per mask, dtype, batch size and grad mode: more variants than the
# default limit of 8. This setting is process-wide.
torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)


def fused(function):
    """Compile `function` for a GPU into one or two kernels; on a CPU it runs as written.

    Only leaves are compiled, never a block, so communication keeps the order it is written in.
    fullgraph turns a graph break into an error: FlexAttention would silently fall back to S x S
    scores. Uncompiled, 8K is 92 % slower, 32K 71 %, with 18 GiB more (of what, see fast.py).

    comprehensive_padding=False works around a PyTorch 2.11 bug: Inductor writes part of lse's
    gradient unpadded and reads it back padded, so dq, dk and dsinks are wrong when S (or H S, with
    several sequences) is over 1024 and not a multiple of 32. 2.13 did not show it
    (docs/LOG.md, 2026-11-25)."""
    compiled = torch.compile(function, fullgraph=True, options={"comprehensive_padding": False})
    name = function.__name__
    SWITCHES.add(name)

    @functools.wraps(function)
    def call(x, *args, **kwargs):
        return (compiled if x.is_cuda and name not in _off else function)(x, *args, **kwargs)

    return call
