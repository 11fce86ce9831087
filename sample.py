"""Text from a model: a converted checkpoint, or a training run.

    python sample.py checkpoints/gpt-oss-20b "Why is the sky blue?"                    # a chat, in the harmony format
    python sample.py checkpoints/gpt-oss-20b "Once upon a time" --no-chat --top_p=0.9  # the text goes on
    python sample.py runs/tiny "The import statement"                                  # bytes: the text goes on
    python sample.py runs/finetune_chat "Which keyword leaves a loop?" --chat --temperature=0
    python sample.py --help

The prompt passes the model some tokens at a time, then each new token alone: what attention needs of the tokens before it,
their keys and values, stays in a KeyValueCache. B sequences, S new tokens, T tokens that attention sees, K key-value heads, D.
"""

import argparse
import codecs
import json
import re
import sys
import time
from pathlib import Path

import torch

from chat import load_harmony
from model import GPTOSS, GPTOSSConfig
from tokenizer import TOKENIZERS, ByteTokenizer, HarmonyTokenizer, get_tokenizer

PROMPT_TOKENS = 128  # that pass the model at a time: attention holds heads x 128 x T scores three times, 13 GB at the full context


class KeyValueCache:
    """The keys and values of the tokens so far, for GPTOSS.features. A windowed layer keeps the few that later tokens can see."""

    def __init__(self, config, capacity):
        self.config, self.capacity = config, capacity  # tokens
        self.length, self.layers = 0, {}

    def extend(self, layer, k, v):
        """Add k and v (B, S, K, D) of new tokens. Returns those (B, T, K, D) that the new tokens see: the last S are their own."""
        window = self.config.window(layer)
        if layer == 0:
            self.length += k.shape[1]
        if window is None:
            if (
                layer not in self.layers
            ):  # the whole room at once: nothing is copied when a token is added
                self.layers[layer] = [
                    x.new_empty(x.shape[0], self.capacity, *x.shape[2:]) for x in (k, v)
                ]
            for room, new in zip(self.layers[layer], (k, v)):
                room[:, self.length - new.shape[1] : self.length] = new
            return [room[:, : self.length] for room in self.layers[layer]]
        if layer in self.layers:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.layers[layer], (k, v)))
        first = max(
            k.shape[1] - (window - 1), 0
        )  # the next token is itself one of the `window` that it sees
        self.layers[layer] = [x[:, first:].clone() for x in (k, v)]  # a view would keep all of x
        return k, v


def draw(logits, temperature, top_p, generator=None):
    """logits (B, V) -> a token for each (B): the likeliest at temperature 0, else drawn from the likeliest ones that together
    have the probability `top_p`."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if top_p < 1:
        likeliest, order = probabilities.sort(-1, descending=True)
        likeliest[likeliest.cumsum(-1) - likeliest >= top_p] = (
            0  # those before it have top_p already
        )
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, likeliest)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def check_request(config, tokens, max_tokens, temperature, top_p):
    """ValueError for a prompt or numbers that `generate` cannot work with."""
    context = config.max_position_embeddings
    if not 0 < len(tokens) < context:
        raise ValueError(
            f"a prompt of {len(tokens)} tokens: this model takes 1 to {context - 1}, and needs room to answer"
        )
    for name, value, fine in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not fine:
            raise ValueError(
                f"{name}={value}: max_tokens is 1 or more, temperature 0 or more, top_p in (0, 1]"
            )


@torch.no_grad()
def generate(
    model,
    tokens,
    max_tokens,
    temperature=1.0,
    top_p=1.0,
    stop=(),
    generator=None,
    prompt_tokens=PROMPT_TOKENS,
):
    """Yield the tokens that follow the list `tokens`, one by one: at most `max_tokens` or what the context has room for, up to
    one in `stop`, which is not yielded. `generator` is a torch.Generator on the model's device. ValueError: see check_request."""
    check_request(model.config, tokens, max_tokens, temperature, top_p)
    max_tokens, device = (
        min(max_tokens, model.config.max_position_embeddings - len(tokens)),
        model.embedding.weight.device,
    )
    cache = KeyValueCache(model.config, len(tokens) + max_tokens)
    new = torch.tensor([tokens], device=device)
    for _ in range(max_tokens):
        for part in new.split(prompt_tokens, dim=1):
            x = model.features(part, cache=cache)  # (1, S, C)
        new = draw(model.unembedding(x[:, -1]), temperature, top_p, generator)[
            None
        ]  # (1, 1), from the last token's logits only
        token = int(new)
        if token in stop:
            return
        yield token


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and text


def chat_prompt(text, tokenizer):
    """The tokens of a chat in which the user says `text`, up to where the assistant goes on."""
    if tokenizer.name == ByteTokenizer.name:
        return tokenizer.encode(f"<|start|>user<|message|>{text}<|end|><|start|>assistant")
    package, harmony = load_harmony()
    system = package.Message.from_role_and_content(package.Role.SYSTEM, package.SystemContent.new())
    user = package.Message.from_role_and_content(package.Role.USER, text)
    return harmony.render_conversation_for_completion(
        package.Conversation.from_messages([system, user]), package.Role.ASSISTANT
    )


def text_of(tokens, tokenizer):
    """Tokens -> pieces of text as they come. A character whose bytes are spread over tokens comes with its last one."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.token_bytes(token))
    yield decoder.decode(b"", final=True)


MARKUP = re.compile(
    r"(?:<\|start\|>assistant)?<\|channel\|>([^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"  # a message begins
    r"|<\|(?:end|return|call)\|>"  # and ends
)
UNFINISHED = re.compile(
    r"<(\|.{0,99})?$|<\|start\|>assistant.{0,99}$", re.DOTALL
)  # markup whose end may still come


def readable(pieces):
    """Harmony's markup, in pieces of text -> [analysis] and [final] before what is said on these channels, a line for each."""
    held = ""
    for piece in pieces:
        text = MARKUP.sub(
            lambda found: f"[{found[1].strip()}] " if found[1] is not None else "\n", held + piece
        )
        cut = found.start() if (found := UNFINISHED.search(text)) else len(text)
        held = text[cut:]
        yield text[:cut]
    yield held


# ----------------------------------------------------------------------------------------------------------------------


def locate(folder, tokenizer=None):
    """The weights folder and the tokenizer's name of a converted checkpoint, a training run runs/NAME, or its runs/NAME/model."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder. convert_hf.py makes checkpoints/NAME, train.py makes runs/NAME"
        )
    run = folder.parent if folder.name == "model" else folder
    try:
        recorded = json.loads((run / "config.json").read_text())["tokenizer"]
    except (OSError, ValueError, KeyError, TypeError):
        recorded = None  # not a training run
    if recorded and not (run / "model").is_dir():
        raise ValueError(
            f"{run}: this run has no model/ yet. train.py with --resume=true finishes it"
        )
    if not tokenizer and not recorded:
        print(
            f"{folder} does not say its tokenizer: {HarmonyTokenizer.name}; --tokenizer=... chooses another",
            file=sys.stderr,
        )
    return run / "model" if recorded else folder, tokenizer or recorded or HarmonyTokenizer.name


def write(
    folder,
    prompt,
    *,
    chat=None,
    max_tokens=1000,
    temperature=1.0,
    top_p=1.0,
    seed=0,
    device=None,
    tokenizer=None,
):
    """Load the model in `folder` and print what it says to `prompt` as it comes, its speed to stderr.

    chat: whether the prompt is a user's message or the beginning of the text; None: a message for the released vocabulary."""
    weights, name = locate(folder, tokenizer)
    tokenizer, device = (
        get_tokenizer(name),
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
    )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={device}: this machine or this PyTorch has no CUDA GPU")
    chat = name == HarmonyTokenizer.name if chat is None else chat
    tokens = chat_prompt(prompt, tokenizer) if chat else tokenizer.encode(prompt)
    config = GPTOSSConfig.from_json(weights / "config.json")
    check_request(config, tokens, max_tokens, temperature, top_p)  # before the weights are read
    if config.vocab_size < tokenizer.vocab_size:
        ours, theirs = config.vocab_size, tokenizer.vocab_size
        other = " or ".join(TOKENIZERS.keys() - {name})
        raise ValueError(
            f"{weights} has {ours} tokens, {name} has {theirs}: choose --tokenizer={other}"
        )
    model = GPTOSS.from_checkpoint(weights, device)
    generator, times = torch.Generator(device).manual_seed(seed), [time.perf_counter()]

    def timed(tokens):
        for token in tokens:
            times.append(time.perf_counter())
            yield token

    answer = generate(model, tokens, max_tokens, temperature, top_p, tokenizer.stop, generator)
    pieces = text_of(timed(answer), tokenizer)
    for number, piece in enumerate(readable(pieces) if chat else pieces):
        print(piece if number or chat else prompt + piece, end="", flush=True)
    print(flush=True)
    speed = (
        f", then {(len(times) - 2) / (times[-1] - times[1]):.1f} tok/s" if len(times) > 2 else ""
    )
    waited = f", the first after {times[1] - times[0]:.2f} s" if len(times) > 1 else ""
    print(
        f"prompt of {len(tokens)} tokens, answer of {len(times) - 1}{waited}{speed}",
        file=sys.stderr,
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description="Text from a model.", allow_abbrev=False)
    parser.add_argument("folder", help="a converted checkpoint, or a training run runs/NAME")
    parser.add_argument("prompt")
    parser.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="ask the prompt, or go on from it"
    )
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=1000,
        help="default: %(default)s, or what the context has room for",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="default: %(default)s; 0: always the likeliest token",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens with this share (default: all)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--tokenizer", choices=TOKENIZERS, help="default: the one the run was trained with"
    )
    try:
        write(**vars(parser.parse_args()))
    except KeyboardInterrupt:
        print()
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: no such device, out of memory
        raise SystemExit(f"sample.py: {error}") from None


if __name__ == "__main__":
    main()
