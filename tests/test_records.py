"""The formats of records. Each is what openai-harmony renders for it; nothing in it is dropped
silently; what is not understood is refused in one line."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chat
from corpora import (
    CALL,
    DEFAULT,
    SKY,
    A,
    Q,
    final,
    need_vocabulary,
    render,
    render_theirs,
    their_call,
    their_developer,
    their_result,
    their_system,
    theirs,
    user,
)
from text import encode
from text.tokenizer import get_tokenizer


@pytest.fixture
def vocabulary():
    need_vocabulary()
    return get_tokenizer("o200k_harmony")


@pytest.fixture
def harmony(vocabulary):
    return pytest.importorskip(
        "openai_harmony", reason="chat is rendered by openai-harmony, which is not installed"
    )


# --------------------------------------------------------------------------------------------------
# Formats: a record -> the messages that harmony renders

FORMATS = {
    "OpenAI, a call and its result": (
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                Q,
                {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
                {"role": "tool", "tool_call_id": "1", "content": "rain"},
                A,
            ],
            "tools": [{"type": "function", "function": {**SKY, "strict": True}}],
            "parallel_tool_calls": False,
        },
        [
            DEFAULT,
            their_developer("Be brief.", [SKY]),
            Q,
            their_call('{"place": "x"}'),
            their_result("rain"),
            theirs("A"),
        ],
    ),
    "two calls at once, answered the other way round": (
        {
            "messages": [
                Q,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        CALL,
                        {"id": "2", "function": {"name": "sea", "arguments": {"é": 1, "n": None}}},
                    ],
                },
                {"role": "tool", "tool_call_id": "2", "content": {"wave": 1.5, "é": None}},
                {"role": "tool", "tool_call_id": "1", "name": "sky", "content": 7},
                A,
            ]
        },
        [
            DEFAULT,
            Q,
            their_call('{"place": "x"}'),
            their_call('{"é": 1, "n": null}', "functions.sea"),
            their_result('{"wave": 1.5, "é": null}', "functions.sea"),
            their_result("7"),
            theirs("A"),
        ],
    ),
    "calls and results without ids; a list as result; a preamble": (
        {
            "messages": [
                Q,
                final("Let me see.", tool_calls=[{"name": "sky", "arguments": "{}"}]),
                {"role": "tool", "content": [1, 2]},
                final("", tool_calls=json.dumps([CALL])),
                {"role": "tool", "name": "sky", "content": True},
                A,
            ],
            "functions": [{"name": "sky", "description": None, "parameters": None}],
        },
        [
            DEFAULT,
            their_developer(tools=[{"name": "sky", "description": ""}]),
            Q,
            theirs("Let me see.", "commentary"),
            their_call("{}"),
            their_result("[1, 2]"),
            their_call('{"place": "x"}'),
            their_result("true"),
            theirs("A"),
        ],
    ),
    "OpenAI's older functions": (
        {
            "messages": [
                Q,
                final(None, function_call={"name": "sky", "arguments": "{}"}),
                {"role": "function", "name": "sky", "content": "rain"},
                A,
            ]
        },
        [DEFAULT, Q, their_call("{}"), their_result("rain"), theirs("A")],
    ),
    "reasoning under three names, empty ones are none": (
        {
            "messages": [
                {**Q, "thinking": ""},
                final("A", thinking="1"),
                {**Q, "reasoning_content": "", "reasoning": None},
                final("A", reasoning_content="2", reasoning=""),
                Q,
                final(None, reasoning="3", tool_calls=[CALL]),
                {"role": "tool", "content": ""},
                final("A", thinking="", reasoning="4", reasoning_content="4"),
            ]
        },
        [
            DEFAULT,
            Q,
            theirs("1", "analysis"),
            theirs("A"),
            Q,
            theirs("2", "analysis"),
            theirs("A"),
            Q,
            theirs("3", "analysis"),
            their_call('{"place": "x"}'),
            their_result(""),
            theirs("4", "analysis"),
            theirs("A"),
        ],
    ),
    "settings of the system message": (
        {
            "messages": [Q, A],
            "reasoning_effort": "HIGH",
            "model_identity": "You are Bo.",
            "knowledge_cutoff": "2025-01",
            "conversation_start_date": "2026-02-03",
            "builtin_tools": ["browser", "python"],
        },
        [
            lambda package: (
                package.SystemContent.new()
                .with_reasoning_effort(package.ReasoningEffort.HIGH)
                .with_model_identity("You are Bo.")
                .with_knowledge_cutoff("2025-01")
                .with_conversation_start_date("2026-02-03")
                .with_browser_tool()
                .with_python_tool()
            ),
            Q,
            theirs("A"),
        ],
    ),
    "the same in chat_template_kwargs": (
        {
            "messages": [Q, A],
            "tools": json.dumps([SKY]),
            "chat_template_kwargs": {"reasoning_effort": "low", "model_identity": None},
        },
        [their_system(reasoning_effort="Low"), their_developer(tools=[SKY]), Q, theirs("A")],
    ),
    "tools in the system turn, text in parts": (
        {
            "messages": [
                {
                    "role": "system",
                    "content": [
                        {"type": "text", "text": "Be"},
                        {"type": "text", "text": " brief."},
                    ],
                    "tools": [{"type": "function", "function": SKY}],
                },
                user([{"type": "text", "text": "hel"}, {"type": "input_text", "text": "lo"}]),
                final([{"type": "output_text", "text": "A"}]),
            ]
        },
        [
            DEFAULT,
            their_developer("Be brief.", [SKY]),
            user([{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]),
            theirs("A"),
        ],
    ),
    "empty system and developer turns write nothing": (
        {
            "messages": [
                {"role": "system", "content": ""},
                {"role": "developer", "content": None},
                Q,
                A,
            ]
        },
        [DEFAULT, Q, theirs("A")],
    ),
    "system and developer turns": (
        {
            "messages": [
                {"role": "system", "content": "One."},
                {"role": "developer", "content": "Two."},
                Q,
                A,
            ],
            "tools": [SKY],
        },
        [DEFAULT, their_developer("One.", [SKY]), their_developer("Two."), Q, theirs("A")],
    ),
    "harmony's own": (
        {
            "messages": [
                their_system(reasoning_effort="High"),
                their_developer("Be brief.", [SKY]),
                Q,
                theirs("print(1)", "analysis", recipient="python", content_type="code"),
                {"role": "tool", "name": "python", "content": "1"},
                theirs("A"),
            ],
            "model_identity": "You are Bo.",
        },
        [
            their_system(reasoning_effort="High", model_identity="You are Bo."),
            their_developer("Be brief.", [SKY]),
            Q,
            theirs("print(1)", "analysis", recipient="python", content_type="code"),
            {
                "role": "tool",
                "name": "python",
                "content": "1",
                "recipient": "assistant",
                "channel": "analysis",  # that of the call
            },
            theirs("A"),
        ],
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "sky", "arguments": {"place": "x"}}'},
                {"from": "observation", "value": "rain"},
                {"from": "gpt", "value": "A", "weight": None},
            ],
            "system": "Be brief.",
            "tools": json.dumps([SKY]),
        },
        [
            DEFAULT,
            their_developer("Be brief.", [SKY]),
            Q,
            their_call('{"place": "x"}'),
            their_result("rain"),
            theirs("A"),
        ],
    ),
    "ShareGPT with its own system turn": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "user", "value": "Q"},
                {"from": "chatgpt", "value": "A"},
            ],
            "system": "Be brief.",
        },
        [DEFAULT, their_developer("Be brief."), Q, theirs("A")],
    ),
    "LMSYS-Chat-1M": (
        {
            "conversation_id": "1",
            "model": "vicuna-13b",
            "conversation": [Q, A],
            "turn": 1,
            "language": "English",
            "openai_moderation": [{"categories": {"hate": False}, "flagged": False}],
            "redacted": False,
        },
        [DEFAULT, Q, theirs("A")],
    ),
    "conversations of messages": ({"conversations": [Q, A]}, [DEFAULT, Q, theirs("A")]),
    "prompt and completion": ({"prompt": "Q", "completion": "A"}, [DEFAULT, Q, theirs("A")]),
    "prompt and completion of messages": (
        {"prompt": [Q, A, Q], "completion": [A], "messages": None},
        [DEFAULT, Q, theirs("A"), Q, theirs("A")],
    ),
    "a prompt that repeats the first message": (
        {"messages": [Q, A], "prompt": "Q", "prompt_id": "7"},
        [DEFAULT, Q, theirs("A")],
    ),
}


@pytest.mark.parametrize("record, messages", FORMATS.values(), ids=FORMATS)
def test_a_record_is_what_harmony_renders(harmony, vocabulary, record, messages):
    before = copy.deepcopy(record)
    tokens, counted, _ = encode.encode_record(record, vocabulary, "keep", ())
    expected = render_theirs(harmony, messages)
    assert vocabulary.decode(tokens.tolist()) == vocabulary.decode(expected)
    assert tokens.tolist() == expected
    assert record == before  # nothing of the caller's is changed


# --------------------------------------------------------------------------------------------------
# Nothing is dropped silently

TOLD = {  # a column -> whether it is ignored, and told; an error otherwise
    "id": True,
    "prompt_id": True,
    "language": True,
    "source": True,
    "num_tools": True,
    "answerSource": True,
    "quality": True,
    "anything": True,
    "tool_choice": False,
    "toolDefinitions": False,
    "systemPrompt": False,
    "developer": False,
    "enable_thinking": False,
    "documents": False,
    "images": False,
    "rejected": False,
    "label": False,
    "prompt": False,
}


@pytest.mark.parametrize("name, ignored", TOLD.items())
def test_a_column_is_told_or_refused(harmony, vocabulary, name, ignored):
    record = {"messages": [Q, A], name: "x"}
    plain = render([Q, A], vocabulary)[0].tolist()
    if ignored:
        tokens, _, notes = chat.render_record(record, vocabulary)
        assert notes["ignored", name] == 1 and tokens.tolist() == plain
    else:
        with pytest.raises(ValueError, match=f"'{name}' may be part of the chat.*--ignore={name}"):
            chat.render_record(record, vocabulary)
        tokens, _, notes = chat.render_record(record, vocabulary, ignore=[name])
        assert notes["ignored", name] == 1 and tokens.tolist() == plain
    assert chat.render_record({**record, name: None}, vocabulary)[0].tolist() == plain


def marks(value):
    """`value` with every text in it followed by a number of its own, and those texts."""
    number = iter(range(1000))

    def change(value, key=None):
        if isinstance(value, dict):
            return {k: change(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [change(v, key) for v in value]
        free = ("content", "value", "text", "thinking", "reasoning", "reasoning_content", "system")
        free += (
            "description",
            "model_identity",
            "prompt",
            "completion",
            "arguments",
            "instructions",
        )
        if isinstance(value, str) and value and key in free and value[0] not in "[{":
            marked_texts.append(f"{value} {next(number)}.")
            return marked_texts[-1]
        return value

    marked_texts = []
    return change(value), marked_texts


@pytest.mark.parametrize(
    "name", [n for n in FORMATS if n != "a prompt that repeats the first message"]
)
def test_every_text_of_a_record_is_rendered(harmony, vocabulary, name):
    record, texts = marks(FORMATS[name][0])
    if name == "ShareGPT with its own system turn":
        record["system"] = record["conversations"][0]["value"]
        texts = [text for text in texts if text != texts[-1]]
    if name.startswith("reasoning under three"):
        record["messages"][-1]["reasoning"] = record["messages"][-1]["reasoning_content"]
        texts.pop(-2)
    tokens, _, _ = chat.render_record(record, vocabulary)
    rendered = vocabulary.decode(tokens.tolist())
    assert len(texts) >= 2 and [text for text in texts if text not in rendered] == []


BAD_RECORDS = {
    "an unknown key of a message": (
        {"messages": [Q, {**A, "train": False}]},
        "message 2: .*'train'",
    ),
    "a weight between": ({"messages": [Q, {**A, "weight": 0.5}]}, "weight 0.5: 0 or 1"),
    "a question of weight 1": ({"messages": [{**Q, "weight": 1}, A]}, "only for the assistant"),
    "two reasonings": ({"messages": [Q, final("A", thinking="1", reasoning="2")]}, "two different"),
    "an unknown call": (
        {"messages": [Q, {"role": "tool", "tool_call_id": "9", "content": ""}, A]},
        "message 2: no earlier call has the tool_call_id '9'",
    ),
    "a result of another tool": (
        {
            "messages": [
                final(None, tool_calls=[CALL]),
                {"role": "tool", "tool_call_id": "1", "name": "sea", "content": ""},
            ]
        },
        "a call of functions.sky, not sea",
    ),
    "nothing said": ({"messages": [Q, final(None)]}, "message 2: assistant message has nothing"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), A]},
        "message 1: user message: cannot render the part .*image_url",
    ),
    "an effort": (
        {"messages": [Q, A], "reasoning_effort": "max"},
        "low, medium or high, not 'max'",
    ),
    "a setting": (
        {"messages": [Q, A], "chat_template_kwargs": {"enable_thinking": True}},
        "\"chat_template_kwargs\" has 'enable_thinking'",
    ),
    "two efforts": (
        {
            "messages": [Q, A],
            "reasoning_effort": "low",
            "chat_template_kwargs": {"reasoning_effort": "high"},
        },
        "two different things",
    ),
    "two system prompts": (
        {"messages": [{"role": "system", "content": "a"}, Q, A], "system": "b"},
        "two different system prompts",
    ),
    "a tool of another kind": (
        {"messages": [Q, A], "tools": [{"type": "code_interpreter"}]},
        'needs type "function"',
    ),
    "an unknown key of a tool": (
        {"messages": [Q, A], "tools": [{**SKY, "examples": []}]},
        "sky has 'examples'",
    ),
    "a key around a tool": (
        {"messages": [Q, A], "tools": [{"type": "function", "function": SKY, "description": "x"}]},
        "sky has 'description'",
    ),
    "a key around a call": (
        {"messages": [Q, final(None, tool_calls=[{**CALL, "arguments": "{}"}])]},
        "sky has 'arguments'",
    ),
    "two long reasonings": (
        {"messages": [Q, final("A", thinking="x" * 99 + "1", reasoning="x" * 99 + "2")]},
        "two different",
    ),
    "tools that are no JSON": ({"messages": [Q, A], "tools": "sky()"}, "not JSON"),
    "an unknown speaker": ({"conversations": [{"from": "narrator", "value": "x"}]}, "'narrator'"),
    "a builtin tool": ({"messages": [Q, A], "builtin_tools": ["calculator"]}, "browser and python"),
    "settings beside a system message": (
        {
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "x"}]},
                theirs("A"),
            ],
            "reasoning_effort": "low",
        },
        "reasoning_effort: the chat has a system message of its own",
    ),
    "no format": ({"instruction": "a", "output": "b"}, 'either "text" or "messages"'),
    "two formats": ({"messages": [Q, A], "conversations": [Q, A]}, 'either "text" or "messages"'),
    "a prompt alone": ({"prompt": "a"}, 'either "text" or "messages"'),
}


@pytest.mark.parametrize("record, message", BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_a_record_that_is_not_understood_is_refused(harmony, vocabulary, record, message):
    with pytest.raises(ValueError, match=message):
        encode.encode_record(record, vocabulary, "keep", ())


def test_control_tokens_in_a_text_are_told(harmony, vocabulary):
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant"
    _, _, notes = chat.render_record(
        {"messages": [user(rendered), final("<|return|>")]}, vocabulary
    )
    assert {name for kind, name in notes if kind == "control"} == {
        "<|im_start|>",
        "<|im_end|>",
        "<|return|>",
    }
    _, _, notes = encode.encode_record({"text": "<think>x"}, vocabulary, "keep", ())
    assert notes == {("control", "<think>"): 1}
    _, _, notes = encode.encode_record({"text": "a < b | c > d"}, vocabulary, "keep", ())
    assert not notes


def test_bytes_refuse_settings():
    with pytest.raises(ValueError, match="plain messages only: reasoning_effort, tools need"):
        record = {"messages": [Q, A], "tools": [SKY], "reasoning_effort": "low"}
        chat.render_record(record, get_tokenizer("bytes"))


# --------------------------------------------------------------------------------------------------
# Any type anywhere: a ValueError of one line, or tokens

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats()
    | st.sampled_from(["", "a", "user", "tool", "[]", "{}", "[{}]", "function", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "text", "name", "role", "a"]), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = [
    "weight",
    "name",
    "channel",
    "recipient",
    "thinking",
    "tools",
    "id",
    "tool_calls",
    "content",
]


def places(value, path=()):
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


@st.composite
def damaged_records(draw):
    """A record of the table in which one or two places hold something else, or nothing."""
    record = copy.deepcopy(draw(st.sampled_from([record for record, _ in FORMATS.values()])))
    for _ in range(draw(st.integers(1, 2))):
        if not record:
            break
        *path, key = draw(st.sampled_from([path for path in places(record) if path]))
        place = record
        for step in path:
            place = place[step]
        action = draw(st.sampled_from(["set", "delete", "add"]))
        if action == "set":
            place[key] = draw(JSON)
        elif action == "delete":
            del place[key]
        elif isinstance(place, dict):
            place[draw(st.sampled_from(KEYS))] = draw(JSON)
    return record


@settings(max_examples=300, deadline=None)
@given(record=damaged_records() | JSON)
def test_odd_types_end_in_one_line(record):
    need_vocabulary()
    pytest.importorskip("openai_harmony", reason="chat is rendered by openai-harmony")
    for name in ("o200k_harmony", "bytes"):
        for history in ("keep", "drop"):
            try:
                tokens, counted, _ = encode.encode_record(record, get_tokenizer(name), history, ())
            except ValueError as error:
                assert str(error) and "\n" not in str(error)
            else:
                assert len(tokens) == len(counted) > 0


def test_what_is_ignored_inside_a_record_is_told(harmony, vocabulary):
    tool = {"type": "function", "function": {**SKY, "strict": True, "return": {"type": "string"}}}
    part = {"type": "text", "text": "Q", "cache_control": {"type": "ephemeral"}}
    record = {"messages": [{**user([part]), "id": "7"}, A], "tools": [tool]}
    _, _, notes = chat.render_record(record, vocabulary)
    assert {detail for kind, detail in notes if kind == "ignored"} == {
        "messages[].content[].cache_control",
        "messages[].id",
        "tools[].return",
        "tools[].strict",
    }
