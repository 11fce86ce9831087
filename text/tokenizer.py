"""Text to tokens and back: the released vocabulary, tiktoken's o200k_harmony, and plain bytes."""

import functools
import re

import tiktoken

# tiktoken panics on about a million blanks in a row: longer runs than this are encoded in pieces
LONGEST_BLANK = 100_000
BLANK = re.compile(rf"(?<!\s)\s{{{LONGEST_BLANK + 1},}}")  # the lookbehind keeps the search linear


class Tokenizer:
    """name, vocab_size, end (the token that ends a document), stop (tokens that end an answer),
    encode(text) -> list of tokens, and token_bytes(token), which may be part of a character.

    A model may have more logits than vocab_size: those have no text and must not be sampled."""

    def decode(self, tokens):
        """Text of a list of tokens; U+FFFD for bytes that are not UTF-8 and tokens without text."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")


WITHOUT_TEXT = "\ufffd".encode()


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8; 256 ends a document."""

    name, vocab_size, end, stop = "bytes", 257, 256, (256,)

    def encode(self, text):
        return list(text.encode("utf-8"))

    def token_bytes(self, token):
        if token == self.end:
            return b"<|endoftext|>"
        return bytes([token]) if 0 <= token < self.end else WITHOUT_TEXT


class HarmonyTokenizer(Tokenizer):
    """The vocabulary of the released models. A special token that the text spells out is encoded as
    text, so no document can forge one."""

    name, vocab_size, end = "o200k_harmony", 201_088, 199_999
    stop = (200_002, 200_012, 199_999)  # <|return|>, <|call|>, <|endoftext|>

    def __init__(self):
        try:
            self.vocabulary = tiktoken.get_encoding(self.name)
        except Exception as error:  # network, file system, a wrong checksum, an old package
            raise OSError(
                f"cannot load the {self.name} vocabulary ({' '.join(str(error).split())[:300]}): "
                f"connect once, or set TIKTOKEN_CACHE_DIR to a folder that holds it, "
                f"or choose --tokenizer=bytes"
            ) from error

    def encode(self, text):
        """ValueError for half a surrogate pair, which JSON can hold and UTF-8 cannot."""
        text.encode("utf-8")
        if len(text) <= LONGEST_BLANK:
            return self.vocabulary.encode_ordinary(text)
        cuts = [0]
        for run in BLANK.finditer(text):
            cuts += range(run.start() + LONGEST_BLANK, run.end(), LONGEST_BLANK)
        pieces = (text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)]))
        return [token for piece in pieces for token in self.vocabulary.encode_ordinary(piece)]

    def token_bytes(self, token):
        try:
            return self.vocabulary.decode_single_token_bytes(token)
        except (KeyError, OverflowError):
            return WITHOUT_TEXT


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (HarmonyTokenizer, ByteTokenizer)}


@functools.cache
def get_tokenizer(name):
    """The Tokenizer of that name. OSError if its vocabulary cannot be loaded."""
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer={name!r} is not known: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
