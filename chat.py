"""Chats to tokens, with what is trained on: the harmony format, https://github.com/openai/harmony."""

import functools
import os
import tempfile

import numpy as np

from tokenizer import ByteTokenizer, HarmonyTokenizer, get_tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "name", "channel", "recipient", "content_type")  # of a message
START = 200_006  # <|start|>


def harmony_messages(messages):
    """A chat as most files hold it -> the messages that harmony would have, as dicts.

    A text as system prompt becomes harmony's developer message; an assistant's "thinking" becomes a message of its own on
    the analysis channel; an answer without a channel is final. Messages that are harmony's already pass as they are."""
    if not isinstance(messages, list):
        raise ValueError('"messages" must be a list')
    normal = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(
                f"a message needs a role out of {', '.join(ROLES)}, not {str(message)[:80]!r}"
            )
        message = {key: value for key, value in message.items() if value is not None}
        role, content = message["role"], message.get("content")
        if role == "assistant" and "thinking" in message:
            normal.append({"role": role, "channel": "analysis", "content": message.pop("thinking")})
        if role == "assistant":
            message.setdefault("channel", "commentary" if "recipient" in message else "final")
        if role == "system" and isinstance(content, str):
            message["role"] = "developer"
        if not isinstance(content, (str, list)) or not message.keys() <= set(KEYS):
            raise ValueError(
                f"{role} message has {sorted(message)}: it needs content, and may have {', '.join(KEYS)}"
            )
        normal.append(message)
    if not any(message["role"] == "assistant" for message in normal):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return normal


@functools.cache
def load_harmony():
    """OpenAI's package and its renderer."""
    try:
        import openai_harmony
    except ImportError:
        raise ValueError(
            "o200k_harmony chats are rendered by OpenAI's package: pip install openai-harmony"
        ) from None
    # harmony reads the same vocabulary file as tiktoken, under the same name: let it find the one already there.
    get_tokenizer(HarmonyTokenizer.name)
    tiktoken_cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), "data-gym-cache"
    )
    os.environ.setdefault("TIKTOKEN_RS_CACHE_DIR", tiktoken_cache)
    return openai_harmony, openai_harmony.load_harmony_encoding("HarmonyGptOss")


def render_harmony(messages):
    """[(role, opening, middle, closing)] of each message: <|start|>assistant, what it says, <|end|> or another; as tokens."""
    package, harmony = load_harmony()
    if messages[0]["role"] != "system":
        messages = [
            {"role": "system", "content": [{"type": "system_content"}]},
            *messages,
        ]  # the standard one
    for message in messages:
        if message["role"] == "developer" and isinstance(message["content"], str):
            message["content"] = [{"type": "developer_content", "instructions": message["content"]}]
    # The reasoning of earlier turns, which a running chat forgets, is kept: without it their answers would be trained as if
    # no thought had led to them.
    keep_reasoning = package.RenderConversationConfig(auto_drop_analysis=False)
    try:
        chat = package.Conversation.from_messages(
            [package.Message.from_dict(message) for message in messages]
        )
        tokens = np.array(harmony.render_conversation_for_training(chat, keep_reasoning))
    except Exception as error:  # pydantic's, Rust's and plain ones
        raise ValueError(
            f"harmony cannot render the chat: {' '.join(str(error).split())}"
        ) from error
    parts = np.split(
        tokens, np.flatnonzero(tokens == START)[1:]
    )  # text cannot hold a special token
    return [
        (message["role"], part[:2], part[2:-1], part[-1:]) for message, part in zip(messages, parts)
    ]


def render_bytes(messages):
    """The same for byte models: <|start|> becomes nine bytes, which text can forge. There is no standard system message, which
    alone would fill their short contexts."""
    rendered = []
    for place, message in enumerate(messages, 1):
        role, content, channel = message["role"], message["content"], message.get("channel")
        if (
            message.keys() - {"role", "content", "channel"}
            or role == "tool"
            or not isinstance(content, str)
        ):
            raise ValueError(
                "--tokenizer=bytes spells out plain messages only: tools and parts need o200k_harmony"
            )
        if role == "developer":
            content = f"# Instructions\n\n{content}"
        middle = (f"<|channel|>{channel}" if channel else "") + f"<|message|>{content}"
        returns = place == len(messages) and channel == "final"
        pieces = f"<|start|>{role}", middle, "<|return|>" if returns else "<|end|>"
        rendered.append((role, *(np.frombuffer(piece.encode(), np.uint8) for piece in pieces)))
    return rendered


def render_chat(messages, tokenizer):
    """Tokens (uint32) of a chat in the harmony format, and which of them the loss counts (bool).

    Counted is what the model itself must produce, on any channel: after the prompt's <|start|>assistant, everything up to
    <|return|> or <|call|>, with the <|end|><|start|>assistant between two messages of one turn. A turn that another message
    follows closes with <|end|>, where the model had written <|return|>; that <|end|> is not counted, or the model would learn
    to run on past its answer."""
    of_bytes = tokenizer.name == ByteTokenizer.name
    rendered = (render_bytes if of_bytes else render_harmony)(harmony_messages(messages))
    tokens, counted, same_turn = [], [], False
    for (role, opening, middle, closing), following in zip(rendered, [*rendered[1:], None]):
        ends = tokenizer.decode(closing.tolist()) == "<|end|>"  # not <|return|>, not <|call|>
        goes_on = (
            ends and role == "assistant" and following is not None and following[0] == "assistant"
        )
        for piece, counts in (
            (opening, same_turn),
            (middle, True),
            (closing, goes_on or not ends or following is None),
        ):
            tokens.append(piece)
            counted.append(np.full(len(piece), role == "assistant" and counts))
        same_turn = goes_on
    if of_bytes:
        tokens.append([tokenizer.end])
        counted.append(counted[-1][-1:])
    return np.concatenate(tokens).astype(np.uint32), np.concatenate(counted)
