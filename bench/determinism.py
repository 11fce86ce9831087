"""Determinism: are two runs of a step equal to the bit, and what does that cost."""

import torch

from bench.common import DEVICE, random_tokens
from bench.report import say, say_row
from bench.speed import ROW, build_ours, our_loss, rows_of, step


def section(options, config, results):
    S, model = options.rows[0], build_ours(config)
    # it would fill every new tensor, for nothing
    torch.utils.deterministic.fill_uninitialized_memory = False
    say("\nForward + backward, then the same with torch.use_deterministic_algorithms(True)")
    say_row(ROW)
    for deterministic in False, True:
        torch.use_deterministic_algorithms(deterministic)
        (row,) = rows_of("ours", model, config, [S], options.recompute)
        results.add("rows", row | {"deterministic": deterministic})
        say_row(ROW, row)
    if any("error" in row for row in results["rows"]):
        return
    losses, first, different = [], {}, []
    for _ in range(2):
        losses.append(step(model, our_loss, random_tokens(config, S))[1])
        for name, p in model.named_parameters():
            bits = p.grad.flatten().view(torch.uint8)
            if name not in first:
                first[name] = bits.cpu()  # a second set of gradients may not fit the GPU
            elif not torch.equal(bits, first[name].to(DEVICE)):
                different.append(name)
    different += ["loss"] * (losses[0] != losses[1])
    normal, exact = (row["seconds"] for row in results["rows"])
    results.save(different=different, cost=exact / normal - 1)
    verdict = "loss and every gradient equal to the bit"
    if different:
        verdict = f"NOT equal: {', '.join(different)}"
    say(f"Two deterministic runs: {verdict}; time {results['cost']:+.1%}")
