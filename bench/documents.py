"""Packed documents: how much slower are they than the same documents as sequences of their own?

    python -m bench --documents=512,4096,mix                              # forward + backward
    torchrun --nproc_per_node 2 -m bench --documents=mix --rows=64K       # training steps

A packed sequence of S tokens is compared with a plain one of S tokens, whose queries see more keys,
and with its documents as plain sequences, S tokens at a time: each length is measured, and the
times are added up by the share of tokens that it has.

"octaves of L": a quarter of the tokens each in documents of about L / 2 and L tokens, half in those
of 2 L. "mix": half of the tokens in one document, half in documents of about 512. Lengths are drawn
uniformly within a tenth of these, then stretched to fill the sequence; their order is random.
"""

import os

import torch
import torch.distributed as dist

from bench import training
from bench.common import DEVICE, attempt
from bench.report import length, say, say_row
from bench.speed import build_ours, measure_steps, step
from loop.budget import flops_of

SHORT = 512  # tokens in the short documents of the mix


def shares(kind, S):
    """{tokens in a document: share of a sequence's tokens in documents of about that length}"""
    if kind == "mix":
        return {S // 2: 1 / 2, min(SHORT, S // 4): 1 / 2}
    return {kind // 2: 1 / 4, kind: 1 / 4, 2 * kind: 1 / 2}


def lengths(kind, S):
    """The lengths of documents that fill a sequence of S tokens, in order."""
    generator, found = torch.Generator().manual_seed(0), []
    for typical, share in shares(kind, S).items():
        number = max(round(share * S / typical), 1)
        drawn = 0.9 + 0.2 * torch.rand(number, generator=generator, dtype=torch.float64)
        ends = (drawn.cumsum(0) / drawn.sum() * round(share * S)).round().long()
        found += torch.diff(ends, prepend=torch.tensor([0])).tolist()
    found[-1] += S - sum(found)  # shares are rounded
    return [found[i] for i in torch.randperm(len(found), generator=generator)]


def numbers(lengths):
    """[3, 2] -> [0, 0, 0, 1, 1]"""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def packed_loss(documents):
    def loss(model, tokens):
        targets = tokens.roll(-1, 1)  # which tokens they are does not matter here
        return model(tokens, targets, documents)

    return loss


def one_gpu(options, config):
    """measure(B, S, documents (S) or None) -> a row, of forward and backward on this GPU."""
    model = build_ours(config)
    model.recompute = "none" if options.recompute == "auto" else options.recompute

    def run(B, S, documents):
        tokens = torch.randint(config.vocab_size, (B, S), device=DEVICE)
        if documents is not None:
            documents = documents.to(DEVICE).expand(B, -1).contiguous()
        try:
            loss = packed_loss(documents)
            return measure_steps(config, S, B * S, lambda: step(model, loss, tokens)[0])
        finally:
            model.zero_grad(set_to_none=True)

    def measure(B, S, documents=None):
        return {"recompute": model.recompute} | attempt(run, B, S, documents)

    return measure


def all_ranks(options, config, results):
    """The same for whole training steps on the ranks of torchrun."""
    config, model, optimizer, _ = training.start(options, config, results)

    def measure(B, S, documents=None):
        row = training.run_row(options, config, model, optimizer, results, B, S, documents)
        # what the first row keeps, the others keep: they are compared
        options.recompute, options.keep_blocks = row["recompute"], row["keep_blocks"]
        return row

    return measure


COLUMNS = [
    ("documents", "documents", "<16"),
    ("sequences", "row", ">10"),
    ("recompute", "recompute", ">11"),
    ("s", "seconds", ">9.4f"),
    ("tok/s", "tokens_per_second", ">10,.0f"),
    ("TFLOP/s", "tflops", ">10.4g"),
    ("slower than its documents", "slower", ">27.1%"),
    ("peak GiB", "peak_gib", ">10.1f"),
]


def section(options, config, results):
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    ranks = "RANK" in os.environ
    measure = all_ranks(options, config, results) if ranks else one_gpu(options, config)
    say("\nPacked documents beside plain sequences" + (", one GPU's speed" if ranks else ""))
    say_row(COLUMNS)

    def add(what, B, S, documents=None):
        row = {"documents": what, "row": f"{B} x {length(S)}"} | measure(B, S, documents)
        if documents is not None and "seconds" in row:
            flops = flops_of(config, documents[None]) * B
            row["tflops"] = flops / row["seconds"] / 1e12 / (dist.get_world_size() if ranks else 1)
        return row

    def show(row):
        results.add("rows", row)
        say_row(COLUMNS, row)

    for B, S in options.rows:
        show(add("none", B, S))
        plain = {}  # seconds per token of plain sequences of a length
        for kind in options.documents:
            name = kind if kind == "mix" else f"octaves of {length(kind)}"
            for n in shares(kind, S):
                if n not in plain:
                    row = add("none", B * S // n, n)
                    show(row)
                    plain[n] = row["seconds"] / (B * S // n * n) if "seconds" in row else None
            row = add(name, B, S, numbers(lengths(kind, S)))
            times = [(plain[n], share) for n, share in shares(kind, S).items()]
            if "seconds" in row and all(time for time, _ in times):
                apart = sum(time * share for time, share in times) * B * S
                row["slower"] = row["seconds"] / apart - 1
            show(row)
    if ranks:
        dist.destroy_process_group()
