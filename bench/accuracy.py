"""Accuracy: the error of bf16 against fp32 with the same weights, ours and transformers'."""

import copy
import math
import re
import time
from collections import defaultdict

import torch

import fast
from bench.common import DEVICE, DTYPE, random_tokens, release
from bench.report import length, say, say_row
from bench.speed import build_ours, build_theirs, our_loss, their_loss


def relative_errors(measured, truth):
    """{group: |measured - truth| / |truth|} of two {name: tensor}. A group is one long vector of
    what has one name in all layers, weights and biases together: blocks.3.attention.qkv.bias
    belongs to qkv."""
    error, norm = defaultdict(float), defaultdict(float)
    for name, t in truth.items():
        group = re.sub(r"blocks\.\d+\.(attention\.|mlp\.)?|[._](weight|bias)$", "", name)
        difference = measured[name].float() - t.float()
        error[group] += difference.square().sum(dtype=torch.float64).item()
        norm[group] += t.float().square().sum(dtype=torch.float64).item()
    return {
        group: math.sqrt(error[group] / norm[group]) if norm[group] else math.nan for group in norm
    }


def logits_and_gradients(model, norm, unembedding, loss_of, tokens):
    """{"logits" or parameter name: logits or gradient} from one forward and backward, because each
    compiles for long."""
    features = []
    hook = norm.register_forward_hook(lambda module, inputs, out: features.append(out.detach()))
    loss_of(model, tokens).backward()
    hook.remove()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": unembedding(features[0]).detach(), **gradients}


def section(options, config, results):
    from convert_hf import HUGGING_FACE, counterparts

    began, S = time.perf_counter(), options.rows[0]

    def progress(text):
        say(f"{time.perf_counter() - began:6.1f} s  {text}")

    tokens, ours = random_tokens(config, S), build_ours(config, DTYPE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():  # initialised to zero, which would hide what is wrong with them
        for name, p in ours.named_parameters():
            if name.endswith(("bias", "sinks")):
                p.normal_(0, 1 if name.endswith("sinks") else 0.02, generator=generator)
    progress("our model is built; now in float32, by definition")
    exact = copy.deepcopy(ours).float()
    exact.recompute = "all"  # one layer's scores take many GiB
    with fast.plain(), torch.compiler.set_stance("force_eager"):  # fp32 kernels compile for minutes
        truth = logits_and_gradients(exact, exact.norm, exact.unembedding, our_loss, tokens)
    del exact
    progress(f"now in {str(DTYPE).removeprefix('torch.')}, compiled")
    measured = logits_and_gradients(ours, ours.norm, ours.unembedding, our_loss, tokens)
    errors = {"ours": relative_errors(measured, truth)}
    progress("now transformers with the same weights")
    pairs, theirs = counterparts(config, HUGGING_FACE, False), build_theirs(config, DTYPE)
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for pair, p in zip(pairs, ours.parameters()):
            for name, value in zip(pair.theirs, pair.to_theirs(p)):
                parameters[name].copy_(value)
    del ours, measured
    release()
    progress("now transformers, compiled")
    found = logits_and_gradients(theirs, theirs.model.norm, theirs.lm_head, their_loss, tokens)
    renamed = {pair.name: pair.to_ours(*(found[name] for name in pair.theirs)) for pair in pairs}
    renamed["logits"] = found["logits"]
    errors["transformers"] = relative_errors(renamed, truth)
    progress("done")
    results.save(tokens=S, truth="ours by definition in float32", errors=errors)
    say_errors(errors, S, results["machine"]["dtype"])


def say_errors(errors, S, dtype):
    say(f"\nRelative error at {length(S)} of {dtype} against the definition in float32:")
    say("of the logits, and of the gradient of")
    columns = [
        ("", "name", "<16"),
        ("ours", "ours", ">12.2e"),
        ("transformers", "theirs", ">14.2e"),
        ("ratio", "ratio", ">8.2f"),
    ]
    say_row(columns)
    ratios = {}
    for name, ours in errors["ours"].items():
        theirs = errors["transformers"][name]
        ratio = ours / theirs if theirs else None
        if ratio is not None:
            ratios[name] = ratio
        say_row(columns, {"name": name, "ours": ours, "theirs": theirs, "ratio": ratio})
    worst = max(ratios.values())
    where = "nowhere" if worst <= 1 else "somewhere"
    say(f"Largest ratio {worst:.2f}: ours is {where} less exact")
