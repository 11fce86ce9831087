"""A corpus on disk: written, opened, checked.

It is a folder of flat little-endian arrays:

    tokens.bin     uint32  the tokens of every document, one after the other
    documents.bin  uint64  where each document starts in that stream, and where the last one ends
    counted.bin    uint8   1 where the loss counts the token as a target
    meta.json              {"tokenizer", "vocab_size", "documents", "tokens", "counted", "checksum"}

"pydoc" and "pydoc-val" are corpora without a folder: the language reference that ships inside every
Python, as bytes.
"""

import contextlib
import hashlib
import json
import os
from array import array
from pathlib import Path

import numpy as np

from text.encode import encode_text
from text.tokenizer import TOKENIZERS, ByteTokenizer

SCANNED = 1 << 22  # tokens that are read at a time where all are


class Writer:
    """Appends documents to a new corpus in `folder`."""

    def __init__(self, folder, meta):
        self.folder, self.meta = Path(folder), dict(meta)
        self.documents = self.tokens = self.counted = 0
        self.hashes, self.lengths = array("Q"), array("Q")  # of each document's tokens
        self.checksum = hashlib.blake2b(digest_size=16)

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.files = [
                stack.enter_context(open(self.folder / name, "wb"))
                for name in ("tokens.bin", "documents.bin", "counted.bin")
            ]
            self.stack = stack.pop_all()
        self.files[1].write(np.array(0, "<u8"))
        return self

    def add(self, tokens, counted):
        tokens, counted = tokens.astype("<u4").tobytes(), counted.astype("u1").tobytes()
        digest = hashlib.blake2b(tokens, digest_size=8).digest()
        self.checksum.update(digest + counted)
        self.hashes.append(int.from_bytes(digest, "little"))
        self.lengths.append(len(counted))
        self.documents += 1
        self.tokens += len(counted)
        self.counted += counted.count(1)
        for file, content in zip(self.files, (tokens, np.array(self.tokens, "<u8"), counted)):
            file.write(content)

    def __exit__(self, kind, *_):
        with self.stack:
            names = ("documents", "tokens", "counted")
            self.meta |= {name: getattr(self, name) for name in names}
            self.meta["checksum"] = self.checksum.hexdigest()
            if kind is None:
                (self.folder / "meta.json").write_text(json.dumps(self.meta) + "\n")


def copy_documents(source, numbers, folder, meta):
    """Write the corpus of the documents with these numbers. Returns its meta."""
    _, tokens, documents, counted, _ = open_folder(source)
    with Writer(folder, meta) as writer:
        for number in numbers:
            a, b = documents[number], documents[number + 1]
            writer.add(tokens[a:b], counted[a:b])
    return writer.meta


# --------------------------------------------------------------------------------------------------
# Opening a corpus


def open_pydoc(held_out):
    """Every 20th topic of Python's language reference, or what the others say that these do not."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    kept = texts[::20]
    if not held_out:
        # Topics quote one another at length. What a held-out topic says is removed from the others:
        # training must not see it.
        seen = {" ".join(part.split()) for text in kept for part in text.split("\n\n")}
        kept = [
            "\n\n".join(part for part in text.split("\n\n") if " ".join(part.split()) not in seen)
            for text in texts
        ]
    encoded = [encode_text(text, ByteTokenizer())[0] for text in kept if text]
    tokens, documents = np.concatenate(encoded), np.cumsum([0, *map(len, encoded)])
    identity = hashlib.blake2b(tokens.tobytes(), digest_size=16).hexdigest()
    return ByteTokenizer, tokens, documents, np.ones(len(tokens), "u1"), identity


class TokenFile:
    """A flat array on disk, read in slices. It is not mapped into memory: if a mapped file is cut,
    or its disk fails, the process dies without a word. The file stays open."""

    def __init__(self, path, dtype, length):
        self.path, self.dtype, self.length = path, np.dtype(dtype), length
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115
        size = os.fstat(self.file.fileno()).st_size
        if size != length * self.dtype.itemsize:
            raise ValueError(
                f"{path}: {size} bytes where meta.json promises {length * self.dtype.itemsize}: "
                "copy or encode the corpus again"
            )

    def __len__(self):
        return self.length

    def __getitem__(self, part):
        """Elements [start, stop). OSError if the file no longer has them."""
        start, stop, _ = part.indices(self.length)
        size, content = max(stop - start, 0) * self.dtype.itemsize, b""
        while len(content) < size:
            place = start * self.dtype.itemsize + len(content)
            try:
                more = os.pread(self.file.fileno(), size - len(content), place)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            if not more:
                raise OSError(
                    f"{self.path}: {os.fstat(self.file.fileno()).st_size} bytes where meta.json "
                    f"promises {self.length * self.dtype.itemsize}: it was cut while in use"
                )
            content += more
        return np.frombuffer(content, self.dtype)


def open_folder(path):
    """The tokenizer's class, tokens, documents (int64), counted and identity of a corpus, of which
    only the lengths are checked."""
    folder = Path(path)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer, length, count = (meta[key] for key in ("tokenizer", "tokens", "documents"))
        tokenizer, checksum = TOKENIZERS[tokenizer], meta.get("checksum", "")
        if type(length) is not int or type(count) is not int or not isinstance(checksum, str):
            raise TypeError("tokens and documents are whole numbers, checksum is text")
        if min(length, count) < 1:
            raise ValueError(f"{folder / 'meta.json'}: the corpus is empty")
        tokens = TokenFile(folder / "tokens.bin", "<u4", length)
        counted = TokenFile(folder / "counted.bin", "u1", length)
        # int64 for arithmetic: offsets past 2**63 turn negative, and fail the check of open_corpus
        documents = TokenFile(folder / "documents.bin", "<u8", count + 1)[:].astype(np.int64)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(no_corpus(folder, error.filename)) from None
    except (KeyError, TypeError, RecursionError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / 'meta.json'}: is not what data.py writes ({error!r}): "
            "encode the corpus again"
        ) from error
    return tokenizer, tokens, documents, counted, checksum or sampled_checksum(tokens, documents)


def no_corpus(folder, missing):
    """What to say where a corpus should be, and how to make one."""
    if folder.is_file():
        return (
            f"{folder} is a file, and training reads a corpus: make one with "
            f"`python data.py {folder} --out data/{folder.stem}`"
        )
    if folder.is_dir() and not (folder / "tokens.bin").exists():
        return (
            f"{missing}: no such file. {folder} is no corpus: if it holds texts, make one with "
            f"`python data.py {folder} --out data/{folder.name}-tokens`"
        )
    return (
        f"{missing}: no such file. A corpus is a folder that `python data.py corpus.jsonl --out "
        f"{folder}` writes, or one of pydoc, pydoc-val"
    )


def sampled_checksum(tokens, documents):
    """For a corpus without a checksum: of its documents' places and of 64 samples of its tokens."""
    checksum = hashlib.blake2b(documents.astype("<u8").tobytes(), digest_size=16)
    for start in np.linspace(0, len(tokens), 64, endpoint=False).astype(int).tolist():
        checksum.update(tokens[start : start + 4096].tobytes())
    return f"sampled-{checksum.hexdigest()}"


def scan(tokens, documents, counted):
    """One pass over a corpus -> its highest token, and how many targets each document has (int64):
    the first token of a document is no target."""
    highest, targets = 0, np.zeros(len(documents) - 1, np.int64)
    for start in range(0, len(tokens), SCANNED):
        highest = max(highest, int(tokens[start : start + SCANNED].max()))
        counts = (counted[start : start + SCANNED] != 0).astype(np.int64)
        first, last = np.searchsorted(documents, (start, start + len(counts)))
        begins = documents[first:last] - start  # of the documents that begin in this part
        counts[begins] = 0
        if first == len(documents) or documents[first] != start:  # one goes on from before
            first, begins = first - 1, np.concatenate([[0], begins])
        targets[first : first + len(begins)] += np.add.reduceat(counts, begins)
    return highest, targets


def open_corpus(path):
    """Open and check a built-in corpus or a folder. Returns what open_folder does, and the number
    of targets of each document."""
    if path in ("pydoc", "pydoc-val"):
        tokenizer, tokens, documents, counted, identity = open_pydoc(path == "pydoc-val")
    else:
        tokenizer, tokens, documents, counted, identity = open_folder(path)
    if documents[0] != 0 or documents[-1] != len(tokens) or (np.diff(documents) <= 0).any():
        raise ValueError(
            f"{Path(path) / 'documents.bin'}: must rise from 0 to {len(tokens)}: "
            "encode the corpus again"
        )
    highest, targets = scan(tokens, documents, counted)
    if highest >= tokenizer.vocab_size:
        raise ValueError(
            f"{Path(path) / 'tokens.bin'}: token {highest} is outside {tokenizer.name}'s "
            f"{tokenizer.vocab_size}"
        )
    return tokenizer, tokens, documents, counted, identity, targets
