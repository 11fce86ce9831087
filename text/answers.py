"""A model's answer in the harmony format: tokens to messages, as they come.

    for message in parse(tokens, tokenizer): message["channel"], message["content"]
    for piece in readable(tokens, tokenizer): print(piece, end="")

An answer continues "<|start|>assistant": headers (channel, recipient, content type) and contents
take turns. Models break the format, so nothing is refused: what cannot be a header is content.
Byte models spell the control tokens out, letter by letter; both kinds are read alike.
"""

import codecs
import re

from text.tokenizer import ByteTokenizer

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = "<|end|>", "<|return|>", "<|call|>"
CONTROL = START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS
SPELLED = re.compile("|".join(map(re.escape, CONTROL)))
# A header is "ROLE to=RECIPIENT<|channel|>CHANNEL to=RECIPIENT <|constrain|>TYPE<|message|>", most
# of it optional. What precedes the channel, whole or begun, after a known role or with the role:
TO = r"\s*(?:to=(?P<recipient>\S*)\s*|to?)?"
SPEAKERS = {True: re.compile(TO), False: re.compile(r"(?P<role>[\w.:-]*)" + TO)}
# and what follows it:
CHANNELS = re.compile(
    r"\s*(?P<channel>(?!to=)\S*)\s*(?:to=(?P<recipient>\S*)\s*)?(?P<rest>.*)", re.DOTALL
)
LONGEST_CHANNEL = 100  # characters of what follows <|channel|>


def pieces(tokens, tokenizer):
    """Tokens -> (control token or None, text), as they come. A character whose bytes are spread
    over tokens comes with the last of them; text that may still become a spelled-out control token
    waits until it has or has not."""
    spelled = tokenizer.name == ByteTokenizer.name
    names = {name.encode(): name for name in CONTROL}
    decoder, held = codecs.getincrementaldecoder("utf-8")("replace"), ""
    for token in tokens:
        piece = tokenizer.token_bytes(token)
        if not spelled and piece in names:
            yield None, decoder.decode(b"", final=True)
            yield names[piece], ""
            continue
        held += decoder.decode(piece)
        while spelled and (found := SPELLED.search(held)):
            yield None, held[: found.start()]
            yield found[0], ""
            held = held[found.end() :]
        last = held.rfind("<") if spelled else -1
        begun = last >= 0 and any(name.startswith(held[last:]) for name in CONTROL)
        text, held = (held[:last], held[last:]) if begun else (held, "")
        yield None, text
    yield None, held + decoder.decode(b"", final=True)


def header_of(role, text):
    """(fields of the message, what is left) of a header without its <|message|>. role: what was
    said before `text`, or None if the role is in it."""
    before, has_channel, after = text.partition(CHANNEL)
    after, constrained, kind = after.partition(CONSTRAIN)
    speaker, channel = SPEAKERS[role is not None].match(before), CHANNELS.match(after)
    fields = {"role": role or speaker["role"] or "assistant"}
    if channel["channel"]:
        fields["channel"] = channel["channel"]
    if recipient := speaker["recipient"] or channel["recipient"]:
        fields["recipient"] = recipient
    if constrained:
        return fields | {"content_type": CONSTRAIN + kind.strip()}, ""
    if has_channel:
        return fields, channel["rest"]
    start = speaker.end() if speaker["recipient"] else 0 if role else speaker.end("role")
    return fields, before[start:]


def begins_header(role, text):
    """Whether `text` is a header, as far as it goes."""
    before, _, after = text.partition(CHANNEL)
    if not SPEAKERS[role is not None].fullmatch(before):
        return False
    return len(after) <= LONGEST_CHANNEL and "\n" not in after


def start_of(control):
    """(role, header) of the message that a control token begins."""
    return None if control == START else "assistant", CHANNEL if control == CHANNEL else ""


def without_message(role, header):
    """The events of a message whose header lacks <|message|>: what is left of it is content."""
    fields, text = header_of(role, header)
    yield "begin", fields
    if text.strip():
        yield "text", text


def events(tokens, tokenizer):
    """("begin", fields of a message), ("text", a piece of its content) and ("end", control token or
    None), as they come."""
    role, header, open_ = "assistant", "", False  # header: a message's, so far
    for control, text in pieces(tokens, tokenizer):
        if open_:
            if control in (*ENDS, START, CHANNEL):  # the last two: its end was left out
                yield "end", control
                open_ = False
                role, header = start_of(control)
            elif text:
                yield "text", text
            continue
        if control == MESSAGE:
            fields, kind = header_of(role, header)
            kind = {"content_type": kind.strip()} if CHANNEL in header and kind.strip() else {}
            yield "begin", kind | fields
            open_ = True
        elif control in (*ENDS, START) or (control == CHANNEL and CHANNEL in header):
            if header.strip():  # without <|message|>
                yield from without_message(role, header)
                yield "end", control
            role, header = start_of(control)
        elif control != CONSTRAIN or (CHANNEL in header and CONSTRAIN not in header):
            header += control or text
            if not begins_header(role, header):
                yield from without_message(role, header)
                open_ = True
    if not open_ and header.strip():
        yield from without_message(role, header)
        open_ = True
    if open_:
        yield "end", None


def parse(tokens, tokenizer):
    """Tokens -> messages: {"role", "content"}, and "channel", "recipient", "content_type" where
    they are given, as openai-harmony's Message has them."""
    messages = []
    for kind, value in events(tokens, tokenizer):
        if kind == "begin":
            messages.append(value | {"content": ""})
        elif kind == "text":
            messages[-1]["content"] += value
    return messages


def readable(tokens, tokenizer):
    """Tokens -> pieces of text as they come: [analysis] before what is said on a channel, [to
    functions.f] before a call, a line for each message."""
    for kind, value in events(tokens, tokenizer):
        if kind == "begin":
            to, said_by = value.get("recipient"), value["role"]
            words = [said_by] if said_by != "assistant" else []
            words += [value["channel"]] if "channel" in value else []
            words += [f"to {to}"] if to else []
            yield f"[{' '.join(words)}] " if words else ""
        else:
            yield value if kind == "text" else "\n"


def text_of(tokens, tokenizer):
    """Tokens -> pieces of text as they come, control tokens spelled out."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        yield decoder.decode(tokenizer.token_bytes(token))
    yield decoder.decode(b"", final=True)
