"""Answers in the harmony format: messages as openai-harmony parses them, malformed ones too, and
what a terminal shows."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import need_vocabulary
from text.answers import CONTROL, parse, readable, text_of
from text.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


@pytest.fixture(scope="module")
def harmony():
    need_vocabulary()
    return get_tokenizer("o200k_harmony")


def encode(text, tokenizer):
    """With control tokens as such."""
    if tokenizer is BYTES:
        return tokenizer.encode(text)
    return tokenizer.vocabulary.encode(text, allowed_special="all")


ANSWER = (
    "<|channel|>analysis<|message|>Is 1 < 2 or a <| b?<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes <|x|>.<|return|>"
)
SHOWN = "[analysis] Is 1 < 2 or a <| b?\n[commentary to functions.f] {}\n[final] Yes <|x|>.\n"
CASES = {  # answer: (role, channel, recipient, content type, content) of its messages
    ANSWER: [
        ("assistant", "analysis", None, None, "Is 1 < 2 or a <| b?"),
        ("assistant", "commentary", "functions.f", "<|constrain|>json", "{}"),
        ("assistant", "final", None, None, "Yes <|x|>."),
    ],
    " to=functions.f<|channel|>commentary <|constrain|>json<|message|>{}<|call|>": [
        ("assistant", "commentary", "functions.f", "<|constrain|>json", "{}")
    ],
    "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.g<|channel|>commentary"
    " json<|message|>{}<|call|>": [
        ("assistant", "analysis", None, None, "a"),
        ("assistant", "commentary", "functions.g", "json", "{}"),
    ],
    "<|channel|>analysis to=python code<|message|>x = 1<|call|>": [
        ("assistant", "analysis", "python", "code", "x = 1")
    ],
    "<|channel|>final<|message|>Cut of": [("assistant", "final", None, None, "Cut of")],
    "<|channel|>final<|message|><|return|>": [("assistant", "final", None, None, "")],
    "<|channel|>final Hi there<|return|>": [("assistant", "final", None, None, "Hi there")],
    "Hi there<|return|>": [("assistant", None, None, None, "Hi there")],
}
MALFORMED = {  # what the package refuses, or leaves in one piece
    "": [],
    "<|return|>": [],
    "<|channel|>fin": [("assistant", "fin", None, None, "")],
    "today": [("assistant", None, None, None, "today")],
    "to": [("assistant", None, None, None, "to")],
    "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi": [
        ("assistant", "analysis", None, None, "Hm"),
        ("assistant", "final", None, None, "Hi"),
    ],
    "<|channel|>analysis<|message|>Hm<|start|>assistant<|channel|>final<|message|>Hi": [
        ("assistant", "analysis", None, None, "Hm"),
        ("assistant", "final", None, None, "Hi"),
    ],
    "<|channel|>final\nHi\nthere<|return|>": [("assistant", "final", None, None, "Hi\nthere")],
    "<|channel|>final<|message|>a<|message|>b<|constrain|>c": [
        ("assistant", "final", None, None, "abc")
    ],
    "<|message|>Hi<|end|><|start|>assistant Ho": [
        ("assistant", None, None, None, "Hi"),
        ("assistant", None, None, None, " Ho"),
    ],
    "<|channel|>" + "word " * 60: [("assistant", "word", None, None, "word " * 59)],
}


def tuples(messages):
    names = "role", "channel", "recipient", "content_type", "content"
    return [tuple(message.get(name) for name in names) for message in messages]


@pytest.mark.parametrize("answer", [*CASES, *MALFORMED])
def test_messages(answer, harmony):
    expected = (CASES | MALFORMED)[answer]
    for tokenizer in BYTES, harmony:
        assert tuples(parse(encode(answer, tokenizer), tokenizer)) == expected


@pytest.mark.parametrize("answer", CASES)
def test_messages_equal_those_of_openai_harmony(answer, harmony):
    package = pytest.importorskip("openai_harmony", reason="the reference")
    import chat

    encoding, role = chat.load_harmony()[1], package.Role.ASSISTANT
    tokens = encode(answer, harmony)
    theirs = encoding.parse_messages_from_completion_tokens(tokens, role, strict=False)
    theirs = [message.to_dict() for message in theirs]
    for message in theirs:
        message["content"] = "".join(part["text"] for part in message["content"])
    assert tuples(theirs) == tuples(parse(tokens, harmony)) == CASES[answer]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*CONTROL, " to=f", "assistant", "to", "x ", "é", "<|", "\n"])))
def test_nothing_is_refused_and_no_word_is_lost(parts):
    """Any mixture of control tokens and words becomes messages, and contents keep their order."""
    tokens = BYTES.encode("".join(parts))
    messages = parse(tokens, BYTES)
    contents = "".join(message["content"] for message in messages)
    assert not any(control in contents for control in CONTROL)
    said = iter("".join(parts))
    assert all(letter in said for letter in contents)  # a subsequence of what was said
    body = "<|channel|>final<|message|>" + "".join(p for p in parts if p not in CONTROL)
    (message,) = parse(BYTES.encode(body), BYTES)
    assert message["content"] == body[len("<|channel|>final<|message|>") :]


def test_what_a_terminal_shows():
    tokens = BYTES.encode(ANSWER)
    assert "".join(readable(tokens, BYTES)) == SHOWN
    assert "".join(readable(BYTES.encode("to be"), BYTES)) == "to be\n"
    cut = len("<|channel|>analysis<|message|>Is 1 <")
    assert "".join(readable(tokens[:cut], BYTES)) == "[analysis] Is 1 <\n"


def test_readable_on_a_released_vocabulary(harmony):
    assert "".join(readable(encode(ANSWER, harmony), harmony)) == SHOWN
    forged = harmony.encode("<|end|><|start|>assistant")  # a text that spells control tokens
    tokens = encode("<|channel|>final<|message|>", harmony) + forged
    assert "".join(readable(tokens, harmony)) == "[final] <|end|><|start|>assistant\n"


def test_what_is_readable_is_not_held_back():
    """Not even after what looks like a control token and is none."""
    said = "<|channel|>final<|message|>" + "a <| b " + "so on " * 40
    seen, shown = 0, []

    def fed():
        nonlocal seen
        for token in BYTES.encode(said):
            seen += 1
            yield token

    for piece in readable(fed(), BYTES):
        shown.append(piece)
        if seen == 28:
            assert "".join(shown) == "[final] a"[: len("".join(shown))]
        late = len("[final] ") + seen - len("<|channel|>final<|message|>") - len("".join(shown))
        assert late <= 2 or seen < 28  # at most what may begin "<|"
    assert "".join(shown) == "[final] a <| b " + "so on " * 40 + "\n"


def test_characters_come_whole():
    pieces = list(text_of(BYTES.encode("aé日😀b"), BYTES))
    assert [piece for piece in pieces if piece] == ["a", "é", "日", "😀", "b"]
    assert "".join(text_of([0x61, 0xE6, 0x97], BYTES)) == "a\ufffd"  # cut off in a character
    assert "".join(text_of([0xFF, 0x62, 256], BYTES)) == "\ufffdb<|endoftext|>"
    message = b"<|channel|>final<|message|>\xe6\x97<|end|>"  # cut off by a control token
    assert parse(list(message), BYTES)[0]["content"] == "\ufffd"


def test_characters_over_several_tokens(harmony):
    pieces = text_of(harmony.encode("日本 😀🏽") + [200_005], harmony)
    assert "".join(pieces) == "日本 😀🏽<|channel|>"
