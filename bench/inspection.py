"""What a model does with a text: which experts read it, what its attention leaves to the sinks, and
how sure it is of the next token.

    python -m bench --inspect checkpoints/gpt-oss-20b "Why is the sky blue?"
    python -m bench --inspect runs/tiny/states/step-00000100 "The import statement"

`inspect(model, tokens)` returns the tensors. The model runs as it is; beside each layer's attention
its softmax is computed once more, by definition, a few queries at a time.

Letters in shapes are model.py's, and L layers.
"""

import math
from typing import NamedTuple

import torch

import sample
import sp
from bench.common import DEVICE
from bench.report import say, say_row
from model import IGNORED, wide
from text.tokenizer import HarmonyTokenizer, get_tokenizer

SCORES = 2**26  # computed at a time: 256 MiB in fp32
EXPERTS = 4  # the busiest of a layer, in the table
TOKENS = 24  # the first of the text, in the table

# --------------------------------------------------------------------------------------------------
# The tensors


class Inspection(NamedTuple):
    """What `inspect` found. Entropies in nats; all but `routes` in fp32."""

    routes: torch.Tensor  # (L, B, S, k) int64: the experts of each token, largest weight first
    weights: torch.Tensor  # (L, B, S, k): what their outputs are multiplied by
    sinks: torch.Tensor  # (L, B, H, S): share of each query's attention that its head's sink takes
    attention: torch.Tensor  # (L, B, H, S): entropy of a query's attention over keys and sink
    entropy: torch.Tensor  # (B, S): entropy of the next token
    logprobs: torch.Tensor  # (B, S - 1): log p of the text's own next token


@torch.no_grad()
def inspect(model, tokens, documents=None):
    """The Inspection of tokens (B, S) int64. documents (B, S), and errors, as in GPTOSS.forward.
    In a sequence-parallel group each rank looks at whole sequences of its own."""
    routed, attended, hooks = [], [], []
    for layer, block in enumerate(model.blocks):
        watch = watch_attention(model.config.window(layer), documents, attended)
        hooks.append(block.attention.register_forward_pre_hook(watch))
        hooks.append(block.mlp.router.register_forward_hook(lambda *call: routed.append(call[2])))
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORED)), dim=1)
    try:
        with sp.alone():
            logp, entropy = model.logprobs(tokens, targets, documents, entropy=True)
    finally:
        for hook in hooks:
            hook.remove()
    # the router sees (N, C)
    routes, weights = (torch.stack(x).unflatten(1, tokens.shape) for x in zip(*routed))
    sinks, attention = map(torch.stack, zip(*attended))
    return Inspection(routes, weights, sinks, attention, entropy, logp[:, :-1])


def watch_attention(window, documents, found):
    """A pre-hook for model.Attention that appends what `sink_shares` returns to `found`."""

    def hook(attention, inputs):
        x, cos, sin, attend = inputs

        def watched(q, k, v, sinks):
            found.append(sink_shares(q, k, sinks, window, documents))
            return attend(q, k, v, sinks)

        return x, cos, sin, watched

    return hook


def sink_shares(q, k, sinks, window=None, documents=None):
    """The softmax of model.dense_attention, whose arguments these are: the share that the sink
    takes, and the entropy over keys and sink, each (B, H, S) fp32."""
    B, S, H, D = q.shape
    K, positions, results = k.shape[2], torch.arange(S, device=q.device), []
    step = max(1, SCORES // (B * H * S))
    for i in range(0, S, step):
        queries = wide(q[:, i : i + step]).unflatten(2, (K, H // K))  # (B, s, K, H/K, D)
        scores = torch.einsum("bskhd,btkd->bkhst", queries, wide(k)) / math.sqrt(D)
        distance = positions[i : i + step, None] - positions  # (s, S)
        visible = distance >= 0
        if window is not None:
            visible = visible & (distance < window)
        if documents is not None:
            same = documents[:, i : i + step, None] == documents[:, None, :]  # (B, s, S)
            visible = (visible & same)[:, None, None]
        scores = scores.masked_fill(~visible, float("-inf")).flatten(1, 2)  # (B, H, s, S)
        column = wide(sinks)[:, None, None].expand(B, H, scores.shape[2], 1)
        probs = torch.cat((scores, column), dim=-1).softmax(-1)
        results.append((probs[..., -1], torch.special.entr(probs).sum(-1)))
    shares, entropies = zip(*results)
    return torch.cat(shares, dim=-1), torch.cat(entropies, dim=-1)


def expert_load(routes, num_experts):
    """routes (L, B, S, k) -> the tokens that each layer's router sends to each expert,
    (L, experts) int64."""
    flat = routes.flatten(1)
    return torch.zeros(len(flat), num_experts, dtype=torch.int64, device=flat.device).scatter_add(
        1, flat, torch.ones_like(flat)
    )


# --------------------------------------------------------------------------------------------------
# The command


def show(folder, text):
    """Print what the model in `folder`, see sample.locate, does with a text. SystemExit with one
    line for a folder or a text that will not do."""
    try:
        source = sample.locate(folder, DEVICE)
        tokenizer = get_tokenizer(source.tokenizer or HarmonyTokenizer.name)
        if source.config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"{folder}: its vocabulary of {source.config.vocab_size} is smaller than that of "
                f"{tokenizer.name}, {tokenizer.vocab_size}: which run trained it?"
            )
        tokens = tokenizer.encode(text)
        if not 0 < len(tokens) <= source.config.max_position_embeddings:
            most = source.config.max_position_embeddings
            raise ValueError(f"a text of {len(tokens)} tokens: {folder} takes 1 to {most}")
        sample.check_memory(folder, source, len(tokens), DEVICE)
        model = source.load()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    found = inspect(model, torch.tensor([tokens], device=DEVICE))
    config = source.config
    say(
        f"{folder}: {config.num_hidden_layers} layers, {config.num_experts} experts, of which a "
        f"token uses {config.experts_per_token}; {len(tokens)} tokens ({tokenizer.name})"
    )
    own = f", loss of the text {-found.logprobs.mean():.2f}" if len(tokens) > 1 else ""
    say(f"next token: entropy {found.entropy.mean():.2f} nats on average{own}")
    say("\nsinks: their share of attention, mean over heads and tokens; load: busiest / average")
    say_layers(found, config)
    say("\np: of the token, given those before it; entropy: of the next; sinks: mean over layers")
    say_tokens(found, tokens, tokenizer)
    if len(tokens) > TOKENS:
        say(f"... and {len(tokens) - TOKENS:,} tokens more")


def say_layers(found, config):
    say_row(LAYERS)
    loads = expert_load(found.routes, config.num_experts)
    for layer, load in enumerate(loads.cpu()):
        by_head = found.sinks[layer].mean((0, 2))  # (H)
        busiest = load.argsort(descending=True, stable=True)[:EXPERTS].tolist()
        shares = (load / load.sum() * config.experts_per_token).tolist()
        row = {
            "layer": layer,
            "keys": config.window(layer) or "all",
            "sinks": by_head.mean().item(),
            "least": f"{by_head.min():.1%} ({by_head.argmin()})",
            "most": f"{by_head.max():.1%} ({by_head.argmax()})",
            "entropy": found.attention[layer].mean().item(),
            "load": (load.max() / load.double().mean()).item(),
            "experts": "  " + ", ".join(f"{e}: {shares[e]:.0%}" for e in busiest if load[e]),
        }
        say_row(LAYERS, row)


LAYERS = [
    ("layer", "layer", ">5"),
    ("keys", "keys", ">6"),
    ("sinks", "sinks", ">8.1%"),
    ("least (head)", "least", ">14"),
    ("most (head)", "most", ">14"),
    ("entropy", "entropy", ">9.2f"),
    ("load", "load", ">7.2f"),
    ("  busiest experts: share of tokens", "experts", "<0"),
]


def say_tokens(found, tokens, tokenizer):
    layers, K = sorted({0, len(found.routes) // 2, len(found.routes) - 1}), found.routes.shape[-1]
    columns = [("token", "token", "<16"), ("p", "p", ">8.1%"), ("entropy", "entropy", ">9.2f")]
    columns += [("sinks", "sinks", ">8.1%")]
    columns += [(f"  experts, layer {i}", i, f"<{max(20, 4 * K)}") for i in layers]
    say_row(columns)
    for i, token in enumerate(tokens[:TOKENS]):
        word = repr(tokenizer.decode([token]))
        row = {
            "token": word if len(word) <= 15 else f"{word[:12]}...",
            "p": found.logprobs[0, i - 1].exp().item() if i else None,
            "entropy": found.entropy[0, i].item(),
            "sinks": found.sinks[:, 0, :, i].mean().item(),
        }
        for layer in layers:
            row[layer] = "  " + " ".join(map(str, found.routes[layer, 0, i].tolist()))
        say_row(columns, row)
