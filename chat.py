"""Chats to tokens, with what is trained on: the harmony format, https://github.com/openai/harmony.

text/records.py reads the formats that chats come in. OpenAI's package renders what is around the
texts (who speaks to whom, on which channel, the system message, the definitions of tools). The
texts themselves are encoded by tiktoken, whose vocabulary is the same, because the package needs
quadratic time for a long run of letters, blanks or signs.
"""

import functools
import os
import re
import tempfile

import numpy as np

from text.records import drop_history, read_chat
from text.tokenizer import ByteTokenizer, HarmonyTokenizer, get_tokenizer

START = 200_006  # <|start|>
# What looks like control tokens of a chat model, ours or another's, when it stands in a text.
CONTROL = re.compile(r"<\|[a-zA-Z]\w*\|>|</?think>|\[/?INST\]|</?start_of_turn>")
LONGEST_RUN = 50_000  # characters without a blank, or blanks, that the package encodes in 1.3 s
LONG_RUN = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN}}}|(?<!\s)\s{{{LONGEST_RUN}}}")


@functools.cache
def load_harmony():
    """OpenAI's package and its renderer."""
    try:
        import openai_harmony
    except ImportError:
        raise ValueError(
            "o200k_harmony chats are rendered by OpenAI's package: pip install openai-harmony"
        ) from None
    # The package reads the same vocabulary file as tiktoken, under the same name: it can use the
    # copy that tiktoken has.
    get_tokenizer(HarmonyTokenizer.name)
    tiktoken_cache = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(
        tempfile.gettempdir(), "data-gym-cache"
    )
    os.environ.setdefault("TIKTOKEN_RS_CACHE_DIR", tiktoken_cache)
    return openai_harmony, openai_harmony.load_harmony_encoding("HarmonyGptOss")


def system_content(package, fields):
    """The part of a system message with these fields; harmony has a default for each."""
    tools = {name: getattr(package.ToolNamespaceConfig, name)() for name in fields.get("tools", ())}
    part = {"type": "system_content"} | fields
    if tools:
        part["tools"] = {tool.name: tool.model_dump() for tool in tools.values()}
    return part


def with_settings(chat, package):
    """The messages of a Chat as harmony wants them: one for the system, one for tools."""
    messages = [dict(message) for message in chat.messages]
    if messages[0]["role"] != "system":
        part = system_content(package, chat.system)
        messages.insert(0, {"role": "system", "content": [part], "counted": False})
    elif chat.system:
        part = messages[0]["content"][0]
        if part["type"] != "system_content" or part.keys() & chat.system.keys():
            raise ValueError(
                f"{', '.join(sorted(chat.system))}: the chat has a system message of its own"
            )
        messages[0]["content"] = [system_content(package, chat.system | part)]
    for message in messages:
        if message["role"] == "developer" and isinstance(message["content"], str):
            part = {"type": "developer_content", "instructions": message["content"]}
            message["content"] = [part]
    if chat.tools:
        namespace = {"name": "functions", "description": None, "tools": chat.tools}
        if messages[1:] and messages[1]["role"] == "developer":
            part = messages[1]["content"][0]
            if part["type"] != "developer_content" or part.get("tools"):
                raise ValueError("tools: the chat has a developer message with tools of its own")
        else:
            part = {"type": "developer_content"}
            messages.insert(1, {"role": "developer", "content": [part], "counted": False})
        part["tools"] = {"functions": namespace}
    return messages


def texts_of(message):
    """The texts of a message that has nothing but texts, or None."""
    content = message["content"]
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content] if all("text" in p for p in content) else None


def strings_in(value):
    """Every text in a nest of lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)


def render_harmony(chat, tokenizer):
    """Chat -> [(role, counted, opening, middle, closing)] of each message, as tokens:
    <|start|>assistant, what it says, and <|end|> or another."""
    package, harmony = load_harmony()
    messages = with_settings(chat, package)
    texts = [texts_of(message) for message in messages]
    frames = [
        {key: value for key, value in message.items() if key != "counted"}
        | ({} if text is None else {"content": ""})
        for message, text in zip(messages, texts)
    ]
    if any(map(LONG_RUN.search, strings_in(frames))):
        raise ValueError(
            f"a run of {LONGEST_RUN:,} characters without a blank, or of blanks, in a system or "
            "developer message or a tool: it would take openai-harmony hours"
        )
    # All reasoning is kept: what is left out was left out by drop_history. The package would leave
    # out what precedes the chat's first final message, even in the last turn.
    keep = package.RenderConversationConfig(auto_drop_analysis=False)
    try:
        conversation = package.Conversation.from_messages(map(package.Message.from_dict, frames))
        tokens = np.array(harmony.render_conversation_for_training(conversation, keep))
    except Exception as error:  # pydantic's, Rust's and plain ones
        raise ValueError(
            f"harmony cannot render the chat: {' '.join(str(error).split())[:500]}"
        ) from error
    parts = np.split(tokens, np.flatnonzero(tokens == START)[1:])  # no text holds a special token
    rendered = []
    for message, text, part in zip(messages, texts, parts, strict=True):
        encoded = [token for piece in text or () for token in tokenizer.encode(piece)]
        middle = np.concatenate([part[2:-1], np.array(encoded, tokens.dtype)])
        rendered.append((message["role"], message["counted"], part[:2], middle, part[-1:]))
    return rendered


def render_bytes(chat):
    """The same for byte models. <|start|> becomes nine bytes, which a text can forge, and there is
    no standard system message: it alone would fill their short contexts."""
    if chat.tools or chat.system:
        raise ValueError(
            "--tokenizer=bytes spells out plain messages only: "
            f"{', '.join(sorted({*chat.system, *['tools'] * bool(chat.tools)}))} need o200k_harmony"
        )
    rendered = []
    for place, message in enumerate(chat.messages, 1):
        role, content, channel = message["role"], message["content"], message.get("channel")
        if (
            message.keys() - {"role", "content", "channel", "counted"}
            or role == "tool"
            or not isinstance(content, str)
        ):
            raise ValueError(
                "--tokenizer=bytes spells out plain messages only: "
                "tools, names and parts need o200k_harmony"
            )
        if role == "developer":
            content = f"# Instructions\n\n{content}"
        middle = (f"<|channel|>{channel}" if channel else "") + f"<|message|>{content}"
        returns = place == len(chat.messages) and channel == "final"
        pieces = f"<|start|>{role}", middle, "<|return|>" if returns else "<|end|>"
        tokens = (np.frombuffer(piece.encode(), np.uint8) for piece in pieces)
        rendered.append((role, message["counted"], *tokens))
    return rendered


def control_tokens(text):
    """The control tokens that a text spells out, each once, sorted."""
    return sorted(set(CONTROL.findall(text)))


def render_record(record, tokenizer, history="keep", ignore=()):
    """A record in one of the formats of text/records.py -> tokens (uint32), which of them the loss
    counts (bool), and notes: (kind, detail) -> how often.

    Counted is what the model itself must produce, on any channel: after the prompt's
    <|start|>assistant, everything up to <|return|> or <|call|>, with the <|end|><|start|>assistant
    between two messages of one turn. A turn that another message follows closes with <|end|> where
    the model had written <|return|>; that <|end|> is not counted, or the model would learn to run
    on past its answer.

    history: "keep" the reasoning of earlier turns, or "drop" it, see drop_history."""
    chat = read_chat(record, ignore)
    notes = chat.notes
    texts = [text for message in chat.messages for text in texts_of(message) or ()]
    for name in control_tokens("\n".join(texts)):
        notes["control", name] += 1
    turns = sum(message["role"] == "user" for message in chat.messages)
    if any(message.get("channel") == "analysis" for message in chat.messages) and turns > 1:
        kept, dropped = drop_history(chat.messages)
        if dropped:
            notes["history", history] += dropped
        if history == "drop":
            chat.messages = kept
    of_bytes = tokenizer.name == ByteTokenizer.name
    rendered = render_bytes(chat) if of_bytes else render_harmony(chat, tokenizer)
    tokens, counted, same_turn = [], [], False
    for (role, trained, opening, middle, closing), following in zip(
        rendered, [*rendered[1:], None]
    ):
        trained = trained and role == "assistant"
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
            counted.append(np.full(len(piece), trained and counts))
        same_turn = goes_on
    if of_bytes:
        tokens.append([tokenizer.end])
        counted.append(counted[-1][-1:])
    tokens, counted = np.concatenate(tokens).astype(np.uint32), np.concatenate(counted)
    if not counted.any():
        notes["nothing", ""] += 1
    return tokens, counted, notes
