"""Text to tokens and back: the released vocabulary, tiktoken's o200k_harmony, and plain bytes."""

import functools

import tiktoken


class Tokenizer:
    """Has a name, vocab_size, end (the token that ends a document), stop (those that end an answer), encode(text) -> list of
    tokens, and token_bytes(token), which may be a part of a character."""

    def decode(self, tokens):
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")


class ByteTokenizer(Tokenizer):
    """A token is a byte of UTF-8, and 256 ends a document."""

    name, vocab_size, end, stop = "bytes", 257, 256, (256,)

    def encode(self, text):
        return list(text.encode("utf-8"))

    def token_bytes(self, token):
        return bytes([token]) if token < self.end else b"<|endoftext|>"


class HarmonyTokenizer(Tokenizer):
    """The vocabulary of the released models. Text that spells a special token stays text: no document can forge one."""

    name, vocab_size, end = "o200k_harmony", 201_088, 199_999
    stop = (200_002, 200_012, 199_999)  # <|return|>, <|call|>, <|endoftext|>

    def __init__(self):
        try:
            self.vocabulary = tiktoken.get_encoding(self.name)
        except OSError as error:
            raise OSError(
                f"cannot load the {self.name} vocabulary: {error}. Connect once, or set TIKTOKEN_CACHE_DIR to a folder "
                f"that holds it, or choose --tokenizer=bytes."
            ) from error

    def encode(self, text):
        return self.vocabulary.encode_ordinary(text)

    def token_bytes(self, token):
        return self.vocabulary.decode_single_token_bytes(token)


TOKENIZERS = {tokenizer.name: tokenizer for tokenizer in (HarmonyTokenizer, ByteTokenizer)}


@functools.cache
def get_tokenizer(name):
    """The Tokenizer of that name. OSError if its vocabulary is out of reach."""
    if name not in TOKENIZERS:
        raise ValueError(f"tokenizer={name!r} is not known: choose one of {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()
