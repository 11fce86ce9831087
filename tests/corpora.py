"""What the tests of data share: records in files, corpora made by hand, data.py as a command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chat

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY_FILE = "fb374d419588a4632f3f557e76b4b70aebbca790"  # tiktoken's name for o200k_base


def need_vocabulary():
    if not os.path.isfile(os.path.join(os.environ.get("TIKTOKEN_CACHE_DIR", ""), VOCABULARY_FILE)):
        pytest.skip(
            "the o200k vocabulary is not here: set TIKTOKEN_CACHE_DIR to a folder with "
            + VOCABULARY_FILE
        )


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_folder(path, lengths, counted=None, seed=0):
    """A corpus of bytes with documents of these lengths; each token differs from its neighbours."""
    path.mkdir(exist_ok=True)
    tokens = (np.arange(sum(lengths)) + seed) % 257
    tokens.astype("<u4").tofile(path / "tokens.bin")
    np.cumsum([0, *lengths]).astype("<u8").tofile(path / "documents.bin")
    counted = np.ones(len(tokens), "u1") if counted is None else np.array(counted, "u1")
    counted.tofile(path / "counted.bin")
    meta = {"tokenizer": "bytes", "vocab_size": 257, "documents": len(lengths)}
    meta |= {"tokens": len(tokens), "counted": int(counted.sum())}
    (path / "meta.json").write_text(json.dumps(meta))
    return str(path)


def read_folder(path):
    """[(tokens, counted)] of each document, as lists, read without the code under test."""
    path = Path(path)
    tokens = np.fromfile(path / "tokens.bin", "<u4")
    counted = np.fromfile(path / "counted.bin", "u1")
    ends = np.fromfile(path / "documents.bin", "<u8").astype(np.int64)
    return [(tokens[a:b].tolist(), counted[a:b].tolist()) for a, b in zip(ends, ends[1:])]


def command_line(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def marked(pieces, counted):
    """The text of pieces, with what is counted in [[ ]]."""
    text = "".join(f"[[{piece}]]" if yes else piece for piece, yes in zip(pieces, counted))
    return text.replace("]][[", "")


# --------------------------------------------------------------------------------------------------
# Chats, and the messages that openai-harmony renders for them

SKY = {
    "name": "sky",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "Where."},
            "unit": {"type": "string", "enum": ["c", "f"], "default": "c"},
        },
        "required": ["place"],
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": '{"place": "x"}'}}


def user(content):
    return {"role": "user", "content": content}


def final(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def their_system(**fields):
    return {"role": "system", "content": [{"type": "system_content", **fields}]}


def their_developer(instructions=None, tools=()):
    part = {"type": "developer_content"}
    if instructions is not None:
        part["instructions"] = instructions
    if tools:
        part["tools"] = {"functions": {"name": "functions", "tools": list(tools)}}
    return {"role": "developer", "content": [part]}


def theirs(content, channel="final", **keys):
    return {"role": "assistant", "channel": channel, "content": content, **keys}


def their_call(arguments, name="functions.sky", **keys):
    return theirs(arguments, "commentary", recipient=name, content_type="json", **keys)


def their_result(content, name="functions.sky"):
    header = {"recipient": "assistant", "channel": "commentary"}
    return {"role": "tool", "name": name, "content": content, **header}


DEFAULT = their_system()
Q, A = user("Q"), final("A")


def render(messages, tokenizer):
    """Tokens and counted of a chat, see chat.render_record."""
    return chat.render_record({"messages": messages}, tokenizer)[:2]


def render_theirs(package, messages):
    """All of a conversation through openai-harmony alone."""
    encoding = chat.load_harmony()[1]
    made = [
        package.Message.from_role_and_content(package.Role.SYSTEM, m(package))
        if callable(m)
        else package.Message.from_dict(m)
        for m in messages
    ]
    keep = package.RenderConversationConfig(auto_drop_analysis=False)
    conversation = package.Conversation.from_messages(made)
    return encoding.render_conversation_for_training(conversation, keep)


def set_meta(path, **changes):
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | changes))
