"""Ulysses sequence parallelism: ranks hold slices of every sequence; attention sees all of it.

Each of the n ranks of a group holds S/n consecutive tokens of every sequence. Norms, projections,
experts and the loss work on single tokens and need no change. Attention needs the whole sequence,
but its heads are independent: one all-to-all trades a slice of tokens with all heads for all tokens
with a slice of heads, and a second one trades back:

    (B, S/n, H, D)  -- seq_to_heads -->  (B, S, H/n, D)
                                               |  attention
    (B, S/n, H, D)  <-- heads_to_seq --  (B, S, H/n, D)

Parameters with one entry per head, such as GPT-OSS's attention sinks, are narrowed to the rank's
heads by `local_heads`, inside autograd and on every call: each rank gets the gradient of its own
heads and zeros elsewhere, and the sum over the ranks is the whole gradient.

    sp.init(mesh)                     # once; without a group every function is the identity
    tokens, targets = sp.shard(tokens, targets)
    attention = sp.ulysses(attention)   # any attention(q, k, v, sinks, ...) over full sequences

B sequences, S tokens of a full sequence, n ranks of the group, H query heads, K key-value heads,
D head dim.
Reference: DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509
"""

import functools
from contextlib import contextmanager

import torch
import torch.distributed as dist

# Per-rank bytes per sequence above which one all-to-all per sequence is cheaper than packing all
# sequences into one.
LARGE_BYTES = 2**24
_group = None  # the ranks that share each sequence; None: no sequence parallelism


def init(mesh):
    """Share each sequence among the ranks of `mesh`, a 1-d DeviceMesh; None ends sharing."""
    global _group
    _group = mesh.get_group() if mesh is not None and mesh.size() > 1 else None


@contextmanager
def alone():
    """Inside, this rank computes whole sequences of its own."""
    global _group
    before, _group = _group, None
    try:
        yield
    finally:
        _group = before


def group():
    """The process group that shares each sequence, or None."""
    return _group


def size():
    return dist.get_world_size(_group) if _group else 1


def rank():
    return dist.get_rank(_group) if _group else 0


class _AllToAll(torch.autograd.Function):
    """x (B, n, ...): in each sequence, rank r's block s becomes rank s's block r. A permutation
    that is its own inverse and its own transpose, so the backward is the same call.

    all_to_all_single needs each destination's data contiguous: true for one sequence; several must
    be copied to (n, B, ...) and back. Large sequences are sent one by one instead: with two
    sequences of 32K tokens, sharing costs two GPUs 2.9 % of their speed instead of 5.1 %
    (docs/LOG.md, 2026-11-25)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group  # the backward may run when `alone` or another group is in force
        if x.shape[1:].numel() * x.element_size() < LARGE_BYTES:
            x = x.transpose(0, 1).contiguous()  # (n, B, ...)
            out = torch.empty_like(x)
            dist.all_to_all_single(out, x, group=group)
            return out.transpose(0, 1)
        x = x.contiguous()
        out = torch.empty_like(x)
        for received, sent in zip(out, x):
            dist.all_to_all_single(received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


def seq_to_heads(x):
    """(B, S/n, H, D) -> (B, S, H/n, D): all tokens, this rank's heads. ValueError unless n
    divides H."""
    n = size()
    if n == 1:
        return x
    B, s, H, D = x.shape
    if H % n:
        raise ValueError(f"sp={n} must divide the number of attention heads, {H}")
    x = x.view(B, s, n, H // n, D).transpose(1, 2)  # (B, n, S/n, H/n, D), n the rank it goes to
    x = _AllToAll.apply(x, _group)  # the same shape, n the rank it came from
    return x.reshape(B, n * s, H // n, D)  # ranks hold the sequence in order: (n, S/n) is S


def heads_to_seq(x):
    """(B, S, H/n, D) -> (B, S/n, H, D): this rank's tokens, all heads. Undoes seq_to_heads."""
    n = size()
    if n == 1:
        return x
    B, S, h, D = x.shape
    x = x.view(B, n, S // n, h, D)  # (B, n, S/n, H/n, D), n the rank it goes to
    x = _AllToAll.apply(x, _group)  # the same shape, n the rank it came from
    return x.transpose(1, 2).reshape(B, S // n, n * h, D)  # rank r has heads r H/n to (r+1) H/n


def repeat_kv(x):
    """(B, S/n, K, D) -> (B, S/n, max(K, n), D): with more ranks than key-value heads, several ranks
    share a head, so it is repeated. Query head h reads key-value head h // (H/K) before and after.
    ValueError unless one of n and K divides the other."""
    n, K = size(), x.shape[2]
    if K % n == 0:
        return x
    if n % K:
        raise ValueError(
            f"sp={n} must divide, or be a multiple of, the number of key-value heads, {K}"
        )
    return x.repeat_interleave(n // K, dim=2)


def local_heads(x):
    """(H, ...) -> (H/n, ...): this rank's slice of a parameter with one entry per head."""
    h = x.shape[0] // size()
    return x.narrow(0, rank() * h, h)


def ulysses(attention):
    """Make `attention(q, k, v, sinks, ...)`, written for full sequences (B, S, heads, D), run on
    slices of them.

    The result takes q (B, S/n, H, D), k and v (B, S/n, K, D), sinks (H) or None, and returns
    (B, S/n, H, D). Further arguments pass through unchanged: a mask, for example, must describe the
    full sequence. Rotary positions are the caller's: see `positions` and `check_positions`."""

    @functools.wraps(attention)
    def parallel(q, k, v, sinks=None, *args, **kwargs):
        q, k, v = seq_to_heads(q), seq_to_heads(repeat_kv(k)), seq_to_heads(repeat_kv(v))
        sinks = local_heads(sinks) if sinks is not None else None
        return heads_to_seq(attention(q, k, v, sinks, *args, **kwargs))

    return parallel


def shard(*batch):
    """Each (B, S, ...) tensor -> this rank's (B, S/n, ...) slice; None stays None. ValueError
    unless n divides S.

    Shift targets before sharding: the target of a slice's last token is on the next rank."""
    n = size()
    for x in batch:
        if x is not None and x.shape[1] % n:
            raise ValueError(f"sp={n} must divide the sequence length, {x.shape[1]}")
    return tuple(None if x is None else x.chunk(n, dim=1)[rank()] for x in batch)


def positions(s, device=None):
    """Positions of this rank's s tokens in the full sequence: (s), int64."""
    return torch.arange(rank() * s, (rank() + 1) * s, device=device)


def check_positions(x):
    """ValueError unless x (..., S/n) are the positions of this rank's slice. A model written for
    one rank counts every slice from 0: its queries and keys are turned wrongly, and nothing in
    their shapes shows it."""
    s = 0 if x is None else x.shape[-1]
    if not s or not (x == positions(s, x.device)).all():
        got = "none" if not s else f"{x.min().item()} to {x.max().item()}"
        raise ValueError(
            f"positions of rank {rank()} of {size()}: got {got}, want sp.positions(length of the "
            f"slice), which starts at {rank() * s}"
        )


def gather_sequence(x):
    """(B, S/n) -> (B, S) on every rank. For integers such as documents: no gradient."""
    if size() == 1:
        return x
    sent = x[:, None].expand(-1, size(), -1)  # (B, n, S/n): every rank is sent the same
    return _AllToAll.apply(sent, _group).flatten(1, 2)


def all_reduce(x):
    """The sum of x over the group, in place. For counts: no gradient."""
    if size() > 1:
        dist.all_reduce(x, group=_group)
    return x
