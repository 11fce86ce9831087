"""Text or chat -> token files, and the reader that turns them into sequences to train on.

    python data.py one.txt two.txt --out data/books                   # .txt: one document a file
    python data.py corpus.jsonl --out data/corpus --seq_len=8192      # .jsonl: {"text": …} or {"messages": […]} a line
    python data.py corpus.jsonl --out data/corpus --tokenizer=bytes   # 256 bytes and an end: nothing to download

A corpus is a folder of flat little-endian arrays, which training maps instead of loading:

    tokens.bin     uint32  the tokens of every document, one after the other
    documents.bin  uint64  where each document starts in that stream, and where the last one ends
    counted.bin    uint8   1 where the loss counts the token as a target
    meta.json              {"tokenizer", "vocab_size", "documents", "tokens", "counted"}

`TokenData` packs whole documents into sequences of seq_len tokens. "pydoc" and "pydoc-val" are corpora without a folder: the
language reference that ships inside every Python, as bytes.

The vocabulary is tiktoken's o200k_harmony; chats are rendered by https://github.com/openai/harmony.
"""

import argparse
import bisect
import functools
import json
import multiprocessing
import os
import shutil
import signal
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from chat import render_chat
from tokenizer import TOKENIZERS, ByteTokenizer, HarmonyTokenizer, get_tokenizer

IGNORED = -100  # a target that the loss does not count, as in model.py

# ----------------------------------------------------------------------------------------------------------------------
# Writing a corpus


def encode_text(text, tokenizer):
    if not isinstance(text, str) or not text:
        raise ValueError("the text is empty" if text == "" else '"text" must be a string')
    text.encode(
        "utf-8"
    )  # half a surrogate pair, which JSON can hold, is no text: a UnicodeEncodeError
    tokens = np.array(tokenizer.encode(text) + [tokenizer.end], np.uint32)
    return tokens, np.ones(len(tokens), bool)


def encode_document(document, tokenizer_name):
    """(file, line number or None, bytes) -> tokens (uint32), counted (bool), number of bytes."""
    path, number, content = document
    tokenizer, where = get_tokenizer(tokenizer_name), path if number is None else f"{path}:{number}"
    try:
        text = content.decode("utf-8-sig")  # a byte order mark is no part of the text
        record = {"text": text} if number is None else json.loads(text)
        if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
            raise ValueError('needs a JSON object with either "text" or "messages"')
        encoded = (
            encode_text(record["text"], tokenizer)
            if "text" in record
            else render_chat(record["messages"], tokenizer)
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # Unicode errors are ValueErrors
        raise ValueError(f"{where}: {error}") from error
    return *encoded, len(content)


def read_documents(paths):
    for path in paths:
        with open(path, "rb") as file:
            if path.lower().endswith(".txt"):
                yield path, None, file.read()
            else:
                yield from (
                    (path, number, line)
                    for number, line in enumerate(file, start=1)
                    if line.strip()
                )


def write_corpus(paths, out, tokenizer_name="o200k_harmony"):
    """Encode files into the folder `out`, on all cores; it appears when it is whole. Returns its meta.json.

    ValueError with the file and line of what cannot be a document, OSError for what cannot be read or written."""
    out = os.path.normpath(out)
    for path in paths:
        if not path.lower().endswith((".txt", ".jsonl")):
            raise ValueError(
                f"{path}: needs to be a .txt (one document) or a .jsonl (one document a line)"
            )
        open(path, "rb").close()  # missing or unreadable: now, not after hours
    if os.path.lexists(out):
        raise ValueError(f"--out={out}: is there already: remove it or choose another name")
    tokenizer = get_tokenizer(
        tokenizer_name
    )  # loaded, perhaps downloaded, once: before there are workers
    encode = functools.partial(encode_document, tokenizer_name=tokenizer_name)
    size = sum(os.path.getsize(path) for path in paths)
    workers = min(os.cpu_count(), 1 + (size >> 20))
    meta = {
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "documents": 0,
        "tokens": 0,
        "counted": 0,
    }
    partial = f"{out}.partial-{os.getpid()}"
    try:
        os.makedirs(partial)
        with (
            open(f"{partial}/tokens.bin", "wb") as tokens_file,
            open(f"{partial}/documents.bin", "wb") as documents_file,
            open(f"{partial}/counted.bin", "wb") as counted_file,
            # Ctrl-C is for this process alone to answer.
            multiprocessing.Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool,
            tqdm(total=size, unit="B", unit_scale=True, desc=out) as bar,
        ):
            documents_file.write(np.array(0, "<u8"))
            for tokens, counted, bytes_read in pool.imap(
                encode, read_documents(paths), chunksize=32
            ):
                meta["documents"] += 1
                meta["tokens"] += len(tokens)
                meta["counted"] += int(counted.sum())
                tokens_file.write(tokens.astype("<u4"))
                counted_file.write(counted.astype("u1"))
                documents_file.write(np.array(meta["tokens"], "<u8"))
                bar.update(bytes_read)
        if not meta["documents"]:
            raise ValueError(f"{', '.join(paths)}: no document, only blank lines")
        Path(partial, "meta.json").write_text(json.dumps(meta) + "\n")
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return meta


# ----------------------------------------------------------------------------------------------------------------------
# Opening a corpus


def open_pydoc(held_out):
    """Every 20th topic of Python's language reference, or what the others say that these do not, as bytes."""
    from pydoc_data.topics import topics

    texts = [topics[name] for name in sorted(topics)]
    kept = texts[::20]
    if not held_out:
        # Topics quote one another at length: what a held-out one says leaves the others too, or training would see it.
        seen = {" ".join(part.split()) for text in kept for part in text.split("\n\n")}
        kept = [
            "\n\n".join(part for part in text.split("\n\n") if " ".join(part.split()) not in seen)
            for text in texts
        ]
    encoded = [encode_text(text, ByteTokenizer())[0] for text in kept if text]
    tokens, documents = np.concatenate(encoded), np.cumsum([0, *map(len, encoded)])
    return ByteTokenizer, tokens, documents, np.ones(len(tokens), "u1")


def map_array(path, dtype, length):
    size, expected = path.stat().st_size, length * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(
            f"{path}: {size} bytes where meta.json promises {expected}: copy or encode the corpus again"
        )
    return np.memmap(path, dtype, mode="r")


def open_corpus(path):
    """The tokenizer's class, tokens, documents (int64) and counted of a built-in corpus or of a folder, checked."""
    if path in ("pydoc", "pydoc-val"):
        return open_pydoc(held_out=path == "pydoc-val")
    folder = Path(path)
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer, length, count = (
            TOKENIZERS[meta["tokenizer"]],
            int(meta["tokens"]),
            int(meta["documents"]),
        )
        if min(length, count) < 1:
            raise ValueError(f"{folder / 'meta.json'}: the corpus is empty")
        tokens = map_array(folder / "tokens.bin", "<u4", length)
        counted = map_array(folder / "counted.bin", "u1", length)
        # int64 for arithmetic: offsets past 2**63 turn negative, and fail the check below
        documents = np.array(map_array(folder / "documents.bin", "<u8", count + 1)).astype(np.int64)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: no such file. A corpus is a folder that `python data.py corpus.jsonl --out {path}` writes, "
            f"or one of pydoc, pydoc-val"
        ) from None
    except (KeyError, TypeError, RecursionError, UnicodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder / 'meta.json'}: is not what data.py writes ({error!r}): encode the corpus again"
        ) from error
    if documents[0] != 0 or documents[-1] != length or (np.diff(documents) <= 0).any():
        raise ValueError(
            f"{folder / 'documents.bin'}: must rise from 0 to {length}: encode the corpus again"
        )
    if (highest := tokens.max()) >= tokenizer.vocab_size:  # read from end to end, but never held
        raise ValueError(
            f"{folder / 'tokens.bin'}: token {highest} is outside {tokenizer.name}'s {tokenizer.vocab_size}"
        )
    return tokenizer, tokens, documents, counted


# ----------------------------------------------------------------------------------------------------------------------
# Sequences to train on


def pack(lengths, seq_len, generator):
    """The row of each piece (lengths 1 to seq_len), and the number of rows: best-fit decreasing.

    The longest pieces go first, each into the fullest row that has room, or else into a new one; which of the pieces of one
    length meet is for the generator to draw. A million pieces take about two seconds."""
    order = generator.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    sequence_of, num_sequences = np.empty(len(lengths), np.int64), 0
    rooms, sequences_with = (
        [],
        defaultdict(list),
    )  # the rooms left in rows, ascending; room -> its rows
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        fullest = bisect.bisect_left(rooms, length)
        if fullest == len(rooms):
            sequence, room, num_sequences = num_sequences, seq_len, num_sequences + 1
        else:
            room = rooms[fullest]
            sequence = sequences_with[room].pop()
            if not sequences_with[room]:
                del rooms[fullest]
        sequence_of[piece] = sequence
        if room := room - length:
            if not sequences_with[room]:
                bisect.insort(rooms, room)
            sequences_with[room].append(sequence)
    return sequence_of, num_sequences


class TokenData:
    """A corpus as an endless series of rows, of which row i depends on the corpus, seq_len, seed and i alone.

    Rows are packed once, by the seed; epoch e takes all of them in an order drawn by (seed, e). A document of n tokens is
    n - 1 pairs of a token and the next. More than seq_len pairs are cut into rows and a rest ("cut": no pair is lost, only
    the context before a cut), or left out ("drop").

    Public: sequences_per_epoch; documents, tokens: of the whole corpus; counted: targets an epoch trains on; padding: share of an
    epoch's places that hold none; dropped: documents left out; tokenizer: its name; vocab_size."""

    def __init__(self, path, seq_len, *, seed=0, long_documents="cut", vocab_size=None):
        """`vocab_size` is the model's: ValueError when the corpus was encoded with a larger vocabulary."""
        for name, value, least in (("seq_len", seq_len, 2), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: needs a whole number, {least} or more")
        if long_documents not in ("cut", "drop"):
            raise ValueError(
                f'long_documents={long_documents!r}: choose "cut" (into pieces of seq_len) or "drop"'
            )
        tokenizer, self.stream, documents, self.counted_stream = open_corpus(path)
        self.path, self.seq_len, self.seed = path, seq_len, seed
        self.tokenizer, self.vocab_size = tokenizer.name, tokenizer.vocab_size
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{path}: encoded by {self.tokenizer} with a vocabulary of {self.vocab_size}, but the model has "
                f"vocab_size={vocab_size}: encode it with another --tokenizer, or train another model"
            )

        starts, ends = documents[:-1], documents[1:]
        pairs = ends - starts - 1
        used = (pairs <= seq_len) | (long_documents == "cut")
        self.documents, self.tokens, self.dropped = len(pairs), len(self.stream), int((~used).sum())
        in_dropped = sum(
            np.count_nonzero(self.counted_stream[a + 1 : b])
            for a, b in zip(starts[~used], ends[~used])
        )
        no_targets = np.count_nonzero(
            self.counted_stream[starts]
        )  # a document's first token is none
        self.counted = np.count_nonzero(self.counted_stream) - no_targets - in_dropped
        if not self.counted:
            raise ValueError(
                f"{path}: no target is left to train on with seq_len={seq_len} and long_documents={long_documents!r} "
                f"({self.dropped} of {self.documents} documents dropped): use more data or a larger seq_len"
            )

        starts, pairs = starts[used], pairs[used]
        pieces = -(-pairs // seq_len)
        before = np.repeat(np.cumsum(pieces) - pieces, pieces)  # pieces of earlier documents
        offsets = (np.arange(pieces.sum()) - before) * seq_len  # of each piece in its document
        lengths = np.minimum(np.repeat(pairs, pieces) - offsets, seq_len)
        sequence_of, self.sequences_per_epoch = pack(lengths, seq_len, np.random.default_rng(seed))
        by_sequence = np.argsort(sequence_of, kind="stable")
        self.piece_starts = (np.repeat(starts, pieces) + offsets)[by_sequence]
        self.piece_lengths = lengths[by_sequence]
        self.sequence_starts = np.searchsorted(
            sequence_of[by_sequence], np.arange(self.sequences_per_epoch + 1)
        )  # in the two above
        self.padding = 1 - int(lengths.sum()) / (self.sequences_per_epoch * seq_len)
        self.epoch, self.epoch_order = None, None

    def describe(self):
        return (
            f"{self.path}: {self.documents:,} documents, {self.tokens:,} tokens ({self.tokenizer}), {self.counted:,} counted; "
            f"{self.sequences_per_epoch:,} sequences of {self.seq_len:,}, {self.padding:.2%} padding, {self.dropped:,} documents dropped"
        )

    def pieces(self, index):
        """Start in the stream and length of each piece in row `index` of the endless series."""
        epoch, place = divmod(int(index), self.sequences_per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences_per_epoch)
            self.epoch, self.epoch_order = epoch, order
        sequence = self.epoch_order[place]
        pieces = slice(self.sequence_starts[sequence], self.sequence_starts[sequence + 1])
        return self.piece_starts[pieces], self.piece_lengths[pieces]

    def batch(self, indices):
        """Rows by their numbers (0, 1, …, any order) -> tokens, targets, documents, each (len(indices), seq_len) int64.

        targets[b, i] is the token after tokens[b, i], -100 where the loss does not count it and on padding, which comes last.
        documents[b, i] numbers the pieces of a row from 0. Padding has the number of the last one, which cannot see it: a row
        of one piece is all zeros, and needs no mask but the causal one."""
        shape = (len(indices), self.seq_len)
        tokens, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for b, index in enumerate(indices):
            starts, lengths = self.pieces(index)
            firsts = np.cumsum(lengths) - lengths  # the place of each piece in the row
            filled = lengths.sum()
            where = np.arange(filled) + np.repeat(starts - firsts, lengths)  # in the stream
            tokens[b, :filled] = self.stream[where]
            targets[b, :filled] = np.where(
                self.counted_stream[where + 1], self.stream[where + 1].astype(np.int64), IGNORED
            )
            documents[b] = np.searchsorted(firsts, np.arange(self.seq_len), side="right") - 1
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents)


# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(
        description="Encode text or chat into a corpus to train on.", allow_abbrev=False
    )
    parser.add_argument(
        "inputs", nargs="+", help=".txt (one document) or .jsonl (one document a line)"
    )
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument(
        "--tokenizer",
        default=HarmonyTokenizer.name,
        choices=TOKENIZERS,
        help="default: %(default)s",
    )
    parser.add_argument(
        "--seq_len", type=int, help="also say how the documents fill sequences of this many tokens"
    )
    options = parser.parse_args()
    if options.seq_len is not None and options.seq_len < 2:
        parser.error(f"--seq_len={options.seq_len}: 2 or more")
    try:
        meta = write_corpus(options.inputs, options.out, options.tokenizer)
        print(
            f"{options.out}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, {meta['counted']:,} counted"
        )
        if options.seq_len is not None:
            print(TokenData(options.out, options.seq_len).describe())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None


if __name__ == "__main__":
    main()
