"""Activation checkpointing that skips what the backward does not need.

A recomputed block keeps only its input, and its forward is replayed for the backward
(torch.utils.checkpoint). The replay must restore every value that the backward reads, but not the
block's output (`replaying`), and it can reuse a costly result that was stored (`once`).
"""


class Recompute:
    """One recomputed block, from its forward to its backward. `inside()` makes a context that the
    forward and the replays run in."""

    current = None  # the recomputed block that is running; None outside of one

    def __init__(self, keep_attention, inside):
        self.keep_attention, self.inside = keep_attention, inside
        self.stored, self.replaying = [], False

    @classmethod
    def contexts(cls, keep_attention, inside):
        """The pair of contexts that torch.utils.checkpoint asks for: forward and replay."""
        state = cls(keep_attention, inside)
        return Run(state, False), Run(state, True)


class Run:
    """The context of a recomputed block's forward, or of its replays."""

    def __init__(self, state, replaying):
        self.state, self.replaying = state, replaying

    def __enter__(self):
        self.outer, self.inner = Recompute.current, self.state.inside()
        Recompute.current, self.state.replaying = self.state, self.replaying
        self.inner.__enter__()

    def __exit__(self, *error):
        self.inner.__exit__(*error)
        Recompute.current = self.outer


def replaying():
    """True while a recomputed block's forward is replayed for its backward."""
    return Recompute.current is not None and Recompute.current.replaying


def once(compute):
    """compute(), a tuple of tensors; on replay the stored result, if attention is kept."""
    state = Recompute.current
    if state is None or not state.keep_attention:
        return compute()
    if not state.replaying:
        state.stored.append(compute())
        return state.stored[-1]
    if not state.stored:
        raise RuntimeError("recompute='attention' serves one backward: choose recompute='all'")
    return state.stored.pop(0)
