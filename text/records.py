"""Records in the formats that people have -> chats in harmony's terms. Nothing is dropped silently.

    {"messages": [{"role", "content", ...}, ...]}     OpenAI's and Hugging Face's, and harmony's own
    {"conversations": [{"from", "value"}, ...]}       ShareGPT; messages may stand there, too
    {"conversation": [{"role", "content"}, ...]}      the same under LMSYS-Chat-1M's name
    {"prompt": ..., "completion": ...}                texts, or lists of messages; the completion is
                                                      trained on

Beside them a record may have tools (or functions), reasoning_effort, model_identity, system,
builtin_tools, conversation_start_date, knowledge_cutoff, and chat_template_kwargs that holds any of
them. A key whose value is null is absent. Any other column is ignored, and counted, if its name
shows that it is no part of the chat (see is_harmless); otherwise it is an error.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from text.sources import without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
HARMONY_KEYS = ("channel", "recipient", "content_type")  # of a message that is harmony's already
REASONING = ("thinking", "reasoning_content", "reasoning")
SHAREGPT = {  # who speaks -> role
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "function_call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
SYSTEM = ("system", "system_prompt", "system_message")  # columns that hold a system turn
SETTINGS = (
    "tools",
    "functions",
    "reasoning_effort",
    "model_identity",
    "builtin_tools",
    "conversation_start_date",
    "knowledge_cutoff",
)
UNRENDERED = {"strict", "return", "returns"}  # of a tool: harmony renders none of them
EFFORTS = {effort.lower(): effort for effort in ("Low", "Medium", "High")}  # as harmony spells them
BUILTIN = ("browser", "python")

# A column may be part of the chat if its name has one of these words, in singular or plural ...
CHAT_WORDS = (
    *("answer", "assistant", "audio", "call", "channel", "chat", "chosen", "completion", "content"),
    *(
        "context",
        "conversation",
        "developer",
        "document",
        "effort",
        "example",
        "function",
        "history",
        "human",
    ),
    *("identity", "image", "input", "instruction", "kwarg", "label", "loss", "mask", "message"),
    *("output", "persona", "prefix", "prompt", "query", "question", "reasoning", "recipient"),
    *("rejected", "response", "role", "suffix", "system", "target", "template", "text", "think"),
    *("thinking", "thought", "tool", "train", "user", "video", "weight"),
)
# ... unless it ends in one of these, which only describe.
DESCRIPTIONS = (
    *("category", "count", "created", "dataset", "date", "domain", "hash", "id", "idx", "index"),
    *("lang", "language", "length", "license", "meta", "metadata", "num", "origin", "quality"),
    *("sample", "score", "sha", "source", "split", "subset", "tag", "time", "timestamp", "title"),
    *("token", "topic", "turn", "updated", "url", "uuid", "version"),
)


@dataclass
class Chat:
    """messages: harmony's, as dicts, each with a bool "counted": whether an answer is trained on.
    system: fields of harmony's system message. tools: [{"name", "description", "parameters"}].
    notes: (kind, detail) of what is worth telling -> how often."""

    messages: list
    system: dict = field(default_factory=dict)
    tools: list = field(default_factory=list)
    notes: Counter = field(default_factory=Counter)


def present(record):
    """The entries of a dict that are not null; nulls further inside, as in arguments, are kept."""
    return {key: value for key, value in record.items() if value is not None}


def brief(value):
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def parsed(value, name):
    """A list or dict that may be stored as JSON text."""
    if isinstance(value, str):
        try:
            return json.loads(value) if value.strip() else []
        except json.JSONDecodeError:
            raise ValueError(f'"{name}" is text that is not JSON: {brief(value)}') from None
    return value


def words(name):
    """The words of a column's name, lower case and singular."""
    found = re.findall(r"[a-z]+|\d+", re.sub(r"([a-z])([A-Z])", r"\1_\2", str(name)).lower())
    return [word if word.endswith("ss") else word.removesuffix("s") for word in found]


def is_description(name):
    """Whether a name says that it only describes: prompt_id, answer_source, num_messages."""
    found = words(name)
    return bool(found) and (found[-1] in DESCRIPTIONS or found[0] in ("num", "n"))


def is_harmless(name):
    """Whether a column can be ignored."""
    return is_description(name) or not any(word in CHAT_WORDS for word in words(name))


# --------------------------------------------------------------------------------------------------
# Tools and the other settings of a record


def flat_function(value, inside, around, what):
    """{"type": "function", "function": {...}}, or the inner part alone, as one flat dict.

    ValueError for keys that are neither `inside` a function nor `around` it."""
    outer = present(value) if isinstance(value, dict) else {}
    inner = outer.pop("function", outer)
    if (
        outer.get("type", "function") != "function"
        or not isinstance(inner, dict)
        or not isinstance(inner.get("name"), str)
    ):
        raise ValueError(f'{what} needs type "function" and a name, not {brief(value)}')
    if inner is outer:
        around = around | inside
    else:
        inside, inner = inside | {"type"}, present(inner)
    if unknown := sorted(map(str, (outer.keys() - around) | (inner.keys() - inside - around))):
        raise ValueError(f"{what}: {inner['name']} has {unknown[0]!r}, which is not known")
    return outer | inner


def read_tools(value, column, notes):
    """OpenAI's and Hugging Face's schemas, or bare functions -> harmony's descriptions."""
    tools = []
    value = parsed(value, column)
    if not isinstance(value, list):
        raise ValueError(f'"{column}" must be a list of tool definitions, not {brief(value)}')
    inside = {"name", "description", "parameters", *UNRENDERED}
    for tool in map(without_nulls, value):
        tool = flat_function(tool, inside, {"type", *UNRENDERED}, f'"{column}"')
        for key in tool.keys() & UNRENDERED:
            notes["ignored", f"{column}[].{key}"] += 1
        parameters = parsed(tool.get("parameters", {}), f"{column}.parameters") or None
        description = tool.get("description", "")
        if not isinstance(parameters, dict | None) or not isinstance(description, str):
            raise ValueError(
                f'"{column}": {tool["name"]} needs a text as description, an object as parameters'
            )
        tools.append({"name": tool["name"], "description": description, "parameters": parameters})
    return tools


def read_settings(settings, notes):
    """The SETTINGS of a record -> (fields of harmony's system message, tools)."""
    system, tools = {}, []
    for key, value in settings.items():
        if key in ("tools", "functions"):
            more = read_tools(value, key, notes)
            if tools and more and more != tools:
                raise ValueError(f'tools are defined twice, the second time as "{key}"')
            tools = tools or more
        elif key == "builtin_tools":
            names = parsed(value, key)
            if not isinstance(names, list) or any(name not in BUILTIN for name in names):
                raise ValueError(
                    f'"builtin_tools" can hold {" and ".join(BUILTIN)}: {brief(value)}'
                )
            system["tools"] = names
        elif not isinstance(value, str):
            raise ValueError(f'"{key}" must be a text, not {brief(value)}')
        elif key == "reasoning_effort":
            if value.lower() not in EFFORTS:
                raise ValueError(f'"reasoning_effort" is low, medium or high, not {brief(value)}')
            system[key] = EFFORTS[value.lower()]
        else:
            system[key] = value
    if not system.get("tools", True):
        del system["tools"]
    return system, tools


# --------------------------------------------------------------------------------------------------
# Messages


class Reader:
    """Turns the messages of one chat into harmony's, one after the other."""

    def __init__(self, messages, tools, builtin, notes):
        self.notes, self.tools, self.builtin, self.messages = notes, tools, builtin, []
        self.calls = []  # calls without a result: (id or None, recipient, channel)
        self.functions = {tool["name"] for tool in tools}  # names without harmony's "functions."
        self.answered = {}  # id -> the same, also after the result
        parts = (
            part
            for m in messages
            if isinstance(m, dict) and isinstance(m.get("content"), list)
            for part in m["content"]
            if isinstance(part, dict)
        )
        self.native = any(
            isinstance(m, dict) and any(m.get(key) is not None for key in HARMONY_KEYS)
            for m in messages
        ) or any(part.get("type") in ("system_content", "developer_content") for part in parts)

    def add(self, role, content, counted=True, **header):
        header = {key: value for key, value in header.items() if value is not None}
        for key, value in header.items():
            if not isinstance(value, str):
                raise ValueError(f'{role} message: "{key}" must be a text, not {brief(value)}')
        self.messages.append({"role": role, **header, "content": content, "counted": counted})

    def content(self, role, value):
        """A text, or harmony's parts."""
        if isinstance(value, list):
            parts = []
            for part in value:
                part = {"type": "text", "text": part} if isinstance(part, str) else part
                kind = part.get("type") if isinstance(part, dict) else None
                if kind in ("text", "input_text", "output_text") and isinstance(
                    part.get("text"), str
                ):
                    for key in present(part).keys() - {"type", "text"}:
                        self.notes["ignored", f"messages[].content[].{key}"] += 1
                    parts.append({"type": "text", "text": part["text"]})
                elif kind in ("system_content", "developer_content") and role in (
                    "system",
                    "developer",
                ):
                    parts.append(without_nulls(part))
                else:
                    raise ValueError(f"{role} message: cannot render the part {brief(part)}")
            return parts
        if not isinstance(value, str):
            raise ValueError(f"{role} message: content must be a text or parts, not {brief(value)}")
        return value

    def read(self, message):
        if not isinstance(message, dict):
            raise ValueError(f"a message needs a role out of {', '.join(ROLES)}: {brief(message)}")
        message = present(message)
        if "from" in message and "role" not in message:
            speaker = message.pop("from")
            if not isinstance(speaker, str) or speaker.lower() not in SHAREGPT:
                raise ValueError(f'"from" is one of {", ".join(SHAREGPT)}, not {brief(speaker)}')
            message["role"] = SHAREGPT[speaker.lower()]
            if "value" in message:
                message["content"] = message.pop("value")
            if message["role"] == "function_call":
                message["role"] = "assistant"
                message["tool_calls"] = parsed(message.pop("content", None), "value")
                if isinstance(message["tool_calls"], dict):
                    message["tool_calls"] = [message["tool_calls"]]
        role = message.pop("role", None)
        role = "tool" if role == "function" else role
        if role not in ROLES:
            raise ValueError(f"a message needs a role out of {', '.join(ROLES)}, not {brief(role)}")
        for key in REASONING:
            if message.get(key) == "":
                del message[key]
        known = {"content", "name", "weight", *HARMONY_KEYS}
        known |= {
            "assistant": {"tool_calls", "function_call", *REASONING},
            "tool": {"tool_call_id"},
            "system": {"tools", "functions"},
            "developer": {"tools", "functions"},
        }.get(role, set())
        for key in message.keys() - known:
            if message.pop(key) in ([], {}, ""):
                continue
            if not is_description(key):
                raise ValueError(
                    f"{role} message has {key!r}, which is not known there: rename or remove it"
                )
            self.notes["ignored", f"messages[].{key}"] += 1
        weight = message.pop("weight", None)
        if weight not in (None, 0, 1) or (role != "assistant" and weight == 1):
            raise ValueError(
                f"{role} message has weight {brief(weight)}: 0 or 1, and 1 only for the assistant"
            )
        header = {key: message.pop(key, None) for key in ("name", *HARMONY_KEYS)}
        getattr(self, f"read_{role}")(message, header, weight != 0)

    def read_user(self, message, header, counted):
        if not message.get("content") and message.get("content") != "":
            raise ValueError("user message has no content: it needs content")
        self.add("user", self.content("user", message["content"]), counted, **header)

    def read_system(self, message, header, counted, role="system"):
        for key in ("tools", "functions"):
            if key in message:
                tools = read_tools(message[key], key, self.notes)
                if self.tools and tools and tools != self.tools:
                    raise ValueError(
                        f"tools are defined twice, the second time in a {role} message"
                    )
                self.tools = self.tools or tools
                self.functions |= {tool["name"] for tool in tools}
        content = message.get("content", "")
        if content in ("", []):  # an empty one writes nothing
            return
        content = self.content(role, content)
        if isinstance(content, list) and not self.native:
            content = "".join(part["text"] for part in content)
        # What is called a system prompt elsewhere is harmony's developer message.
        role = "developer" if isinstance(content, str) else role
        self.add(role, content, counted, **header)

    def read_developer(self, message, header, counted):
        self.read_system(message, header, counted, role="developer")

    def read_assistant(self, message, header, counted):
        thoughts = [message[key] for key in REASONING if key in message]
        if any(thought != thoughts[0] for thought in thoughts):
            raise ValueError("assistant message has two different texts of reasoning")
        if thoughts:
            if not isinstance(thoughts[0], str):
                raise ValueError(
                    f"assistant message: reasoning must be a text, not {brief(thoughts[0])}"
                )
            self.add("assistant", thoughts[0], counted, channel="analysis")
        calls = parsed(message.get("tool_calls", []), "tool_calls")
        if not isinstance(calls, list):
            raise ValueError(f'"tool_calls" must be a list, not {brief(calls)}')
        if message.get("function_call"):
            calls = [*calls, parsed(message["function_call"], "function_call")]
        content = message.get("content")
        if content is None and not thoughts and not calls:
            raise ValueError("assistant message has nothing to say: it needs content or tool_calls")
        if content is not None and not (calls and content in ("", [])):
            called = header["recipient"] is not None
            # Text before a call is harmony's preamble, which the user sees.
            channel = header["channel"] or ("commentary" if calls or called else "final")
            if called:
                self.calls.append((None, header["recipient"], channel))
            content = self.content("assistant", content)
            self.add("assistant", content, counted, **header | {"channel": channel})
        for call in calls:
            self.read_call(call, counted)

    def read_call(self, call, counted):
        inside, around = {"name", "arguments", "content_type"}, {"id", "type", "index"}
        call = flat_function(call, inside, around, "a tool call")
        name, arguments, key = call["name"], call.get("arguments", {}), call.get("id", "")
        if isinstance(arguments, dict):
            arguments = json.dumps(arguments, ensure_ascii=False)
        if not isinstance(arguments, str) or not isinstance(key, str | int):
            raise ValueError(
                f"a call of {name} needs an object or text as arguments, and a text as id: "
                f"{brief(call)}"
            )
        recipient = self.recipient(name, called=True)
        self.calls.append((key, recipient, "commentary"))
        self.answered[key] = self.calls[-1]
        header = {"recipient": recipient, "channel": "commentary"}
        header["content_type"] = call.get("content_type", "json")
        self.add("assistant", arguments, counted, **header)

    def recipient(self, name, called=False):
        """harmony's name of a tool: functions are called functions.NAME."""
        if name.startswith("functions.") or name.split(".")[0] in self.builtin:
            return name
        if called:
            self.functions.add(name)
        return f"functions.{name}" if name in self.functions else name

    def read_tool(self, message, header, counted):
        name, call = header["name"], None
        if name is not None:
            if not isinstance(name, str):
                raise ValueError(f'tool message: "name" must be a text, not {brief(name)}')
            name = self.recipient(name)
        if (key := message.get("tool_call_id")) not in (None, ""):
            call = self.answered.get(key) if isinstance(key, str | int) else None
            if call is None and name is None:
                raise ValueError(f"no earlier call has the tool_call_id {brief(key)}")
            if name is not None and call is not None and name != call[1]:
                raise ValueError(f"tool_call_id {brief(key)} is a call of {call[1]}, not {name}")
        elif waiting := [c for c in self.calls if name in (None, c[1])]:
            call = waiting[0]
        if call is None and name is None:
            raise ValueError("tool message needs a name, a tool_call_id, or a call before it")
        if call in self.calls:
            self.calls.remove(call)
        if header["recipient"] is None and header["channel"] is None:
            header["recipient"], header["channel"] = "assistant", call[2] if call else "commentary"
        content = message.get("content", "")
        texts = isinstance(content, list) and all(
            isinstance(part, dict) and "text" in part and "type" in part for part in content
        )
        if not isinstance(content, str) and not (content and texts):  # an object, a number
            content = json.dumps(content, ensure_ascii=False)
        header["name"] = name or call[1]
        self.add("tool", self.content("tool", content), counted, **header)


# --------------------------------------------------------------------------------------------------


def read_messages(value, name):
    if not isinstance(value, list):
        raise ValueError(f'"{name}" must be a list of messages, not {brief(value)}')
    return value


def prompt_and_completion(record):
    """Messages of {"prompt", "completion"}; those of the prompt have weight 0."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    prompt, completion = read_messages(prompt, "prompt"), read_messages(completion, "completion")
    if not all(isinstance(message, dict) for message in prompt):
        raise ValueError(f'"prompt" must be a text or a list of messages, not {brief(prompt)}')
    return [message | {"weight": 0} for message in prompt] + completion


def read_chat(record, ignore=()):
    """A record (dict) -> Chat. `ignore` names columns to ignore whatever they are called.

    ValueError, in one line, for what cannot be rendered."""
    record = present(record)
    notes, rest = Counter(), dict(record)
    if "messages" in record:
        messages = read_messages(rest.pop("messages"), "messages")
        first = next((m for m in messages if isinstance(m, dict) and m.get("role") == "user"), {})
        if "prompt" in rest and rest["prompt"] == first.get("content"):  # UltraChat repeats it
            del rest["prompt"]
            notes["ignored", "prompt, which the first user message repeats"] += 1
    elif name := next((key for key in ("conversations", "conversation") if key in record), None):
        messages = read_messages(rest.pop(name), name)
    else:
        messages = prompt_and_completion(rest)
        del rest["prompt"], rest["completion"]

    for name in ignore:
        if name in rest:
            del rest[name]
            notes["ignored", name] += 1
    settings = {key: rest.pop(key) for key in SETTINGS if key in rest}
    kwargs = parsed(rest.pop("chat_template_kwargs", {}), "chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise ValueError(f'"chat_template_kwargs" must be an object, not {brief(kwargs)}')
    for key, value in present(kwargs).items():
        if key not in SETTINGS:
            raise ValueError(
                f'"chat_template_kwargs" has {key!r}, which is none of {", ".join(SETTINGS)}'
            )
        if settings.setdefault(key, value) != value:
            raise ValueError(f'"{key}" and "chat_template_kwargs" say two different things')
    if rest.pop("parallel_tool_calls", None) is not None:  # says how to sample, not what to render
        notes["ignored", "parallel_tool_calls"] += 1
    prompts = {key: rest.pop(key) for key in SYSTEM if key in rest}
    for key, value in prompts.items():
        if not isinstance(value, str):
            raise ValueError(f'"{key}" must be a text, not {brief(value)}')
        turn = {"role": "system", "content": value}
        first = messages[0] if messages and isinstance(messages[0], dict) else {}
        text = first.get("content", first.get("value"))
        if first.get("role", first.get("from")) in ("system", "developer") and text and value:
            if text != value:
                raise ValueError(f'"{key}" and the first message are two different system prompts')
        else:
            messages = [turn, *messages]
    for key, value in rest.items():
        if value in ("", [], {}):
            continue
        if not is_harmless(key):
            raise ValueError(
                f"{key!r} may be part of the chat and is not understood: remove it, "
                f"or say --ignore={key}"
            )
        notes["ignored", key] += 1

    system, tools = read_settings(settings, notes)
    reader = Reader(messages, tools, system.get("tools", ()), notes)
    for number, message in enumerate(messages, start=1):
        try:
            reader.read(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    if not any(message["role"] == "assistant" for message in reader.messages):
        raise ValueError("no message of the assistant: there is nothing to learn")
    return Chat(reader.messages, system, reader.tools, notes)


def drop_history(messages):
    """`messages` without the reasoning that the prompt of the last turn no longer holds, which is
    that of every turn before; and the number of such turns.

    An answer whose reasoning is gone becomes context: trained on, it would teach to answer without
    a thought."""
    roles = [message["role"] for message in messages]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=0)
    final = max((i for i in range(last_user) if messages[i].get("channel") == "final"), default=-1)
    turn_of, turns, forgetful = [], 0, set()
    for i, message in enumerate(messages):
        turns += message["role"] == "user"
        turn_of.append(turns)
        if i <= final and message["role"] == "assistant" and message.get("channel") == "analysis":
            forgetful.add(turns)
    kept = [
        message | {"counted": message["counted"] and turn not in forgetful}
        for i, (turn, message) in enumerate(zip(turn_of, messages))
        if not (i <= final and message.get("channel") == "analysis")
    ]
    return kept, len(forgetful)
