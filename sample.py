"""Text from a model: a converted checkpoint, or a training run.

    python sample.py checkpoints/gpt-oss-20b "Why is the sky blue?"                    # a chat, in the harmony format
    python sample.py checkpoints/gpt-oss-20b "Once upon a time" --no-chat --top_p=0.9  # the text goes on
    python sample.py runs/tiny "The import statement"                                  # bytes: the text goes on
    python sample.py runs/finetune_chat "Which keyword leaves a loop?" --chat --temperature=0
    python sample.py --help

"""

import argparse
import codecs
import json
import re
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import torch

from chat import load_harmony
from generate import Decoder, check_request, room_for
from model import GPTOSS, GPTOSSConfig
from tokenizer import TOKENIZERS, ByteTokenizer, HarmonyTokenizer, get_tokenizer

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
    capacity, times = len(tokens) + room_for(config, tokens, max_tokens), [time.perf_counter()]
    decoder = Decoder(model, 1, capacity, temperature, top_p)

    def answer():
        stream = decoder.stream([tokens], max_tokens, tokenizer.stop, [seed])
        while True:
            with redirect_stdout(sys.stderr):  # for what is said about kernels
                _, token, _ = next(stream, (0, None, 0))
            if token is None or token in tokenizer.stop:
                return
            times.append(time.perf_counter())
            yield token

    pieces = text_of(answer(), tokenizer)
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
