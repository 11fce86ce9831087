"""Text from a model: a converted checkpoint, a training run, or one of its saved states.

    python sample.py checkpoints/gpt-oss-20b                                   # a chat
    python sample.py checkpoints/gpt-oss-20b "Why is the sky blue?" --reasoning=high
    python sample.py checkpoints/gpt-oss-20b "Once upon a time" --no-chat --top_p=0.9
    python sample.py runs/tiny "The import statement"                          # the text goes on
    python sample.py runs/finetune_chat --chat --state=best --temperature=0
    python sample.py --help

With a prompt it answers, or continues the text, and ends. Without one it is a chat: a line is a
message, Ctrl-C stops an answer, the end of the input ends it. The text goes to stdout, everything
else to stderr.
"""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch

import fast
import lora
from chat import START, render_bytes, render_harmony
from generate import Decoder, cache_bytes, check_request, room_for
from model import GPTOSS, GPTOSSConfig
from snapshots import adapter_settings, find_state, load_state, run_of, state_config, state_dtype
from text.answers import parse, readable, text_of
from text.records import EFFORTS, Chat, drop_history
from text.tokenizer import TOKENIZERS, ByteTokenizer, HarmonyTokenizer, get_tokenizer
from weights import find_model, free_memory, read_json, stored_dtype

GIB = 2**30
MAX_TOKENS = 1000  # of a text that goes on; an answer in a chat may fill the context


# --------------------------------------------------------------------------------------------------
# Which model


class Source(NamedTuple):
    """A model that can be loaded: load() -> GPTOSS, its size in bytes, its dtype, and the name of
    the tokenizer that its run recorded, or None."""

    config: GPTOSSConfig
    load: Callable
    size: int
    dtype: torch.dtype
    tokenizer: str | None


def locate(folder, device, state=None):
    """The Source, on `device`, of a converted checkpoint, a training run or its model/, or a run's
    saved state: the state's folder, or a run and `state`, see find_state. ValueError if there is
    none."""
    if path := find_state(folder, state):
        config = state_config(path)
        recorded = read_json(run_of(path) / "config.json").get("tokenizer")
        # trained in bf16 on a GPU, whatever the optimizer stores
        dtype = torch.bfloat16 if device.type == "cuda" else None
        load = functools.partial(load_state, path, device, dtype)
        if settings := adapter_settings(path):  # their base's weights count
            source = Path(settings["base"])
            stored = stored_dtype(source)
            dtype = dtype or stored
            size = file_bytes(source) * dtype.itemsize // stored.itemsize
            return Source(config, load, size, dtype, recorded)
        with torch.device("meta"):
            size = sum(p.numel() for p in GPTOSS(config).parameters())
        dtype = dtype or state_dtype(path)
        return Source(config, load, size * dtype.itemsize, dtype, recorded)
    found = find_model(folder)
    if found.layout not in ("ours", "adapters"):
        raise ValueError(
            f"{folder} is in another layout: `python convert_hf.py {folder}` makes a folder of ours"
        )
    source = found.weights
    if found.layout == "adapters":
        source = Path(lora.read_settings(found.weights)["base"])
    config = GPTOSSConfig.from_json(source / "config.json")
    load = functools.partial(lora.from_checkpoint, found.weights, device)
    return Source(config, load, file_bytes(source), stored_dtype(source), found.tokenizer)


def file_bytes(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def check_memory(folder, source, capacity, device):
    """ValueError if the weights and the cache do not fit."""
    cache, free = cache_bytes(source.config, 1, capacity, source.dtype), free_memory(device)
    if source.size + cache > free:
        raise ValueError(
            f"{folder}: {source.size / GIB:.1f} GiB of weights and {cache / GIB:.1f} GiB of cache "
            f"for {capacity} tokens do not fit into the {free / GIB:.1f} GiB that {device} has "
            "free; --context and --max_tokens make the cache smaller"
        )


def drawable(vocab_size, tokenizer):
    """(vocab_size) bool: the tokens that have text. A model's vocabulary may be larger than its
    tokenizer's, and the released one has reserved names."""
    reserved = [
        token < tokenizer.vocab_size and tokenizer.token_bytes(token).startswith(b"<|reserved_")
        for token in range(tokenizer.end, vocab_size)
    ]
    has_text = torch.arange(vocab_size) < tokenizer.vocab_size
    has_text[tokenizer.end :] &= ~torch.tensor(reserved)
    return has_text


# --------------------------------------------------------------------------------------------------
# Prompts and answers


def chat_prompt(messages, tokenizer, system="", reasoning=None):
    """The tokens of a chat, up to where the assistant goes on. Reasoning of earlier turns is left
    out, as the released models are served."""
    messages = [message | {"counted": False} for message in messages]
    if system:
        messages.insert(0, {"role": "developer", "content": system, "counted": False})
    chat = Chat(
        drop_history(messages)[0], {"reasoning_effort": EFFORTS[reasoning]} if reasoning else {}
    )
    if tokenizer.name == ByteTokenizer.name:
        rendered, opening = render_bytes(chat), tokenizer.encode("<|start|>assistant")
    else:
        rendered = render_harmony(chat, tokenizer)
        opening = [START, *tokenizer.encode("assistant")]
    tokens = [int(token) for _, _, *parts in rendered for part in parts for token in part]
    return tokens + opening


def respond(decoder, prompt, max_tokens, seed, tokenizer, show, out):
    """Print the answer to `prompt` as it comes, by `show`, and its speed to stderr. Returns its
    tokens without the one that ends it. Ctrl-C ends it too."""
    said, times = [], [time.perf_counter()]

    def tokens():
        stream = decoder.stream([prompt], max_tokens, tokenizer.stop, [seed])
        while True:
            with redirect_stdout(sys.stderr):  # for what is said about kernels
                _, token, _ = next(stream, (0, None, 0))
            if token is None or token in tokenizer.stop:
                return
            times.append(time.perf_counter())
            said.append(token)
            yield token

    stopped = ""
    try:
        for piece in show(tokens(), tokenizer):
            print(piece, end="", flush=True, file=out)
        if show is text_of:
            print(flush=True, file=out)
    except KeyboardInterrupt:
        print(flush=True, file=out)
        stopped = ", stopped"
    first = f", the first after {times[1] - times[0]:.2f} s" if said else ""
    speed = (len(times) - 2) / max(times[-1] - times[1], 1e-9) if len(said) > 1 else 0
    then = f", then {speed:.1f} tok/s" if speed else ""
    about = f"prompt of {len(prompt)} tokens, answer of {len(said)}{stopped}{first}{then}"
    print(about, file=sys.stderr, flush=True)
    return said


def ask():
    """The next line of the user, or None at the end."""
    if sys.stdin.isatty():
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return None
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def converse(decoder, tokenizer, system, reasoning, max_tokens, seed, out):
    """A chat: each line is a message. When the context is full, the oldest turns are left out."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, input() then edits lines and remembers them
    turns, room = [], decoder.capacity - max(decoder.capacity // 4, 1)
    while (line := ask()) is not None:
        if not line.strip():
            continue
        turns.append([{"role": "user", "content": line}])
        while True:
            prompt = chat_prompt(sum(turns, []), tokenizer, system, reasoning)
            if len(prompt) <= room or len(turns) == 1:
                break
            turns.pop(0)
            print("the context is full: the oldest turn is left out", file=sys.stderr)
        if len(prompt) >= decoder.capacity:
            print(f"a prompt of {len(prompt)} tokens: the context holds {decoder.capacity}, "
                  "and needs room to answer", file=sys.stderr)  # fmt: skip
            turns.pop()
            continue
        most = max_tokens or decoder.capacity - len(prompt)
        said = respond(decoder, prompt, most, seed, tokenizer, readable, out)
        seed += 1
        known = {"role", "content"} | ({"channel"} if tokenizer.name == ByteTokenizer.name else
                                       {"channel", "recipient", "content_type"})  # fmt: skip
        for message in parse(said, tokenizer):
            if message["role"] == "assistant":
                turns[-1].append({key: message[key] for key in message.keys() & known})
            if "recipient" in message:
                print(f"{message['recipient']} is called; nothing runs here", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The command


def write(
    folder,
    prompt=None,
    *,
    chat=None,
    state=None,
    system="",
    reasoning=None,
    max_tokens=None,
    temperature=1.0,
    top_p=1.0,
    seed=0,
    context=None,
    device=None,
    tokenizer=None,
):
    """Load the model in `folder` and print what it says to `prompt`; without one, chat.

    chat: whether the prompt is a user's message or the beginning of a text; None: a message if the
    vocabulary is the released one. Errors are found before the weights are read."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device={device}: this machine or this PyTorch has no CUDA GPU")
    source, out = locate(folder, device, state), sys.stdout
    name = tokenizer or source.tokenizer
    if name is None:
        name = HarmonyTokenizer.name
        other = "--tokenizer=... chooses another"
        print(f"{folder} does not say its tokenizer: {name}; {other}", file=sys.stderr)
    tokenizer, config = get_tokenizer(name), source.config
    if config.vocab_size < tokenizer.vocab_size:
        other = " or ".join(TOKENIZERS.keys() - {name})
        raise ValueError(
            f"{folder} has {config.vocab_size} tokens, {name} has {tokenizer.vocab_size}: "
            f"choose --tokenizer={other}"
        )
    if prompt is None and chat is False:
        raise ValueError("--no-chat continues a text: give it a prompt")
    chat = (prompt is None or name == HarmonyTokenizer.name) if chat is None else chat
    if (system or reasoning) and not chat:
        raise ValueError("--system and --reasoning belong to a chat: --chat makes the prompt one")
    if context is not None and not 1 < context <= config.max_position_embeddings:
        raise ValueError(f"--context={context}: 2 to {config.max_position_embeddings} tokens")
    capacity = context or config.max_position_embeddings
    if chat:
        message = {"role": "user", "content": "" if prompt is None else prompt}
        tokens = chat_prompt([message], tokenizer, system, reasoning)
    else:
        tokens = tokenizer.encode(prompt)
        max_tokens = MAX_TOKENS if max_tokens is None else max_tokens
    most = capacity if max_tokens is None else max_tokens
    check_request(config, tokens, most, temperature, top_p)
    if prompt is not None:
        if len(tokens) >= capacity:
            raise ValueError(f"a prompt of {len(tokens)} tokens leaves no room in {capacity}")
        capacity = min(len(tokens) + room_for(config, tokens, most), capacity)
    check_memory(folder, source, capacity, device)

    model = source.load()
    texts = drawable(config.vocab_size, tokenizer)
    decoder = Decoder(model, 1, capacity, temperature, top_p, texts)
    if prompt is None:
        return converse(decoder, tokenizer, system, reasoning, max_tokens, seed, out)
    if not chat:
        print(prompt, end="", flush=True, file=out)
    most = capacity - len(tokens)
    respond(decoder, tokens, most, seed, tokenizer, readable if chat else text_of, out)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", help="a converted checkpoint, a training run runs/NAME, or a state of one")
    add("prompt", nargs="?", help="a message, or the beginning of a text; without it: a chat")
    add("--chat", action=argparse.BooleanOptionalAction, help="answer the prompt, or continue it")
    add("--state", help="of a run: best, last, or a number of steps (default: the finished model)")
    add("--system", default="", help="instructions that come before the chat")
    add("--reasoning", choices=EFFORTS, help="how long the model thinks (default: medium)")
    add("--max_tokens", type=int,
        help=f"default: {MAX_TOKENS}; in a chat as many as fit")  # fmt: skip
    add("--temperature", type=float, default=1.0, help="default: %(default)s; 0: the likeliest")
    add("--top_p", type=float, default=1.0,
        help="draw from the likeliest tokens with this share (default: all)")  # fmt: skip
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--context", type=int, metavar="TOKENS", help="prompt and answer (default: the model's)")
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--tokenizer", choices=TOKENIZERS, help="default: the one the run was trained with")
    add("--fast", choices=["true", "false"], default="true",
        help="false: the definitions of model.py, without their fast twins")  # fmt: skip
    return parser.parse_intermixed_args()  # also options between folder and prompt


def main():
    options = vars(parse_arguments())
    for stream in sys.stdin, sys.stdout, sys.stderr:  # an ASCII terminal shows ? for the rest
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with nullcontext() if options.pop("fast") == "true" else fast.plain():
            write(**options)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory, no device
        raise SystemExit(f"sample.py: {str(error).strip() or type(error).__name__}") from None


if __name__ == "__main__":
    main()
