"""Text and chats to token files, and the reader that packs them into sequences to train on.

    python data.py one.txt two.txt --out data/books                    # a .txt is one document
    python data.py chats.jsonl --out data/chats --val=0.01             # a record a line
    python data.py --mix web.parquet=2 chats.jsonl=1 --out data/mixed  # by share of the tokens
    python data.py owner/name:train --out data/name                    # a data set of the Hub
    python data.py chats.jsonl --show=3                                # what is trained on, marked
    python data.py --help

text/sources.py says what is read, text/records.py which formats of chats, text/corpus.py how a
corpus is stored. `TokenData` packs its documents into sequences of seq_len tokens.
"""

import argparse
import bisect
import contextlib
import itertools
import os
import shutil
import sys
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from folders import Aside
from text.corpus import Writer, copy_documents, open_corpus, open_folder
from text.encode import encode_all
from text.sources import find_files, read_documents
from text.tokenizer import TOKENIZERS, HarmonyTokenizer, get_tokenizer

IGNORED = -100  # a target that the loss does not count, as in model.py
END = "<|endoftext|>"  # as many files write it between documents
SHOWN = 2000  # tokens of a document that --show prints

# --------------------------------------------------------------------------------------------------
# Writing a corpus


class Report:
    """What is worth telling of the documents that were encoded."""

    def __init__(self, say, skip_bad):
        self.say, self.skip_bad, self.bad, self.notes = say, skip_bad, 0, Counter()

    def skip(self, error):
        self.bad += 1
        if self.bad > self.skip_bad:
            raise ValueError(error)
        self.say(f"skipped {error}")

    def lines(self, history):
        found = defaultdict(list)
        for (kind, detail), number in sorted(self.notes.items()):
            found[kind].append((detail, number))

        def listed(kind):
            return ", ".join(f"{detail} ({number:,})" for detail, number in found[kind])

        if found["ignored"]:
            yield f"columns that are no part of the text, ignored: {listed('ignored')}"
        if found["control"]:
            fix = "if chats were rendered already, give them as messages"
            if any(detail == END for detail, _ in found["control"]):
                fix += f"; --separator='{END}' divides a .txt there"
            yield (
                "warning: documents with control tokens as text, which stay text: "
                f"{listed('control')}: {fix}"
            )
        for _, turns in found["history"]:
            kept = (
                "is kept and trained on; in use, prompts hold none: see --history=drop"
                if history == "keep"
                else "is left out, as in use; their answers are not trained on"
            )
            yield f"history={history}: the reasoning of {turns:,} earlier turns {kept}"
        for _, number in found["nothing"]:
            yield f"warning: {number:,} chats have no answer to train on"
        if self.bad:
            yield f"{self.bad:,} documents skipped"


def choose_held_out(hashes, share):
    """Which documents are kept aside (bool). A document's tokens alone decide, so equal ones stay
    together, and documents that are added later move none. At least one is, and not all."""
    held_out = hashes < np.uint64(share * 2**64)
    if not held_out.any():
        held_out = hashes == hashes.min()
    if held_out.all():
        raise ValueError(f"--val={share}: no document is left to train on")
    return held_out


def repeat(lengths, hashes, source_of, weights):
    """Documents, by number, of which each source has its weight's share of the tokens.

    Each document occurs at least once: a source that is short of its share is repeated, first as a
    whole, then in part, in the order of the hashes."""
    tokens = np.bincount(source_of, lengths, len(weights))
    wanted = np.array(weights) * np.max(tokens / weights)
    chosen = []
    for source, (has, want) in enumerate(zip(tokens, wanted)):
        mine = np.flatnonzero(source_of == source)
        times = int(want // has)
        by_hash = mine[np.argsort(hashes[mine], kind="stable")]
        part = by_hash[np.cumsum(lengths[by_hash]) <= want - times * has + 0.5]
        chosen += [mine] * times + [np.sort(part)]
    return np.concatenate(chosen)


def choose(writer, source_of, paths, weights, val, say):
    """Of the documents that were written: the numbers of those to train on, in the order of their
    sources, and of those kept aside."""
    hashes, source_of = np.array(writer.hashes), np.array(source_of)
    held_out = choose_held_out(hashes, val) if val else np.zeros(len(hashes), bool)
    chosen = np.flatnonzero(~held_out)
    if weights is not None:
        before = np.bincount(source_of[chosen], minlength=len(paths))
        for path, number in zip(paths, before):
            if not number:
                raise ValueError(f"{path}: has no document to train on")
        lengths = np.array(writer.lengths)
        rest = repeat(lengths[chosen], hashes[chosen], source_of[chosen], weights)
        chosen = chosen[rest]
        for number, path in enumerate(paths):
            mine = chosen[source_of[chosen] == number]
            say(
                f"{path}: {lengths[mine].sum() / lengths[chosen].sum():.1%} of the tokens, "
                f"{len(mine) / before[number]:.3g} times each of {before[number]:,} documents"
            )
    return chosen, np.flatnonzero(held_out)


def write_corpus(
    paths,
    out,
    tokenizer_name=HarmonyTokenizer.name,
    *,
    weights=None,
    history="keep",
    val=0,
    max_records=None,
    skip_bad=0,
    separator=None,
    ignore=(),
    say=lambda text: None,
):
    """Encode files into the folder `out`, which appears when it is whole. Returns its meta.json.

    weights: of each path, see `repeat`. history, ignore: see chat.render_record. val: share of the
    documents that goes to the folder OUT-val. max_records: of all paths, or of each if they have
    weights. skip_bad: how many documents may be bad; `say` gets a line for each, and for all else
    worth telling. separator: between the documents of a .txt.

    ValueError with the file and line of what cannot be a document, OSError for what cannot be read
    or written."""
    out = os.path.normpath(out)
    sources = [find_files(path) for path in paths]
    for path, files in zip(paths, sources):
        if len(files) > 1 or files[0][1] != path:
            shown = ", ".join(name for name, _ in files[:10]) + ", ..." * (len(files) > 10)
            say(f"{path}: {len(files):,} files: {shown}")
    tokenizer = get_tokenizer(tokenizer_name)  # perhaps downloaded: before there are workers
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "history": history}
    if weights is not None:
        meta["mix"] = dict(zip(paths, weights))
    else:
        sources = [list(itertools.chain(*sources))]
    size = sum(os.path.getsize(path) for files in sources for _, path in files)
    workers = min(os.cpu_count(), 1 + (size >> 20))
    settings = {"tokenizer": tokenizer_name, "history": history, "ignore": tuple(ignore)}
    report, source_of = Report(say, skip_bad), array("L")
    with Aside(out) as folder, Aside(f"{out}-val") if val else contextlib.nullcontext() as aside:
        divided = val or weights is not None
        whole = folder / "whole" if divided else folder
        whole.mkdir(exist_ok=True)
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=out)
        with Writer(whole, meta) as writer, bar:
            for number, files in enumerate(sources):
                documents = read_documents(files, separator, bar.update)
                documents = itertools.islice(documents, max_records)
                for _, result in encode_all(documents, workers, **settings):
                    if isinstance(result, str):
                        report.skip(result)
                        continue
                    tokens, counted, notes = result
                    report.notes.update(notes)
                    writer.add(tokens, counted)
                    source_of.append(number)
        if not writer.documents:
            raise ValueError(f"{', '.join(paths)}: no document, only blank lines")
        if divided:
            chosen, held_out = choose(writer, source_of, paths, weights, val, say)
            if val:
                copy_documents(whole, held_out, aside, meta)
                say(f"{out}-val: {len(held_out):,} documents kept aside by --val={val}")
            written = copy_documents(whole, chosen, folder, meta)
            shutil.rmtree(whole)
    for line in report.lines(history):
        say(line)
    return written if divided else writer.meta


# --------------------------------------------------------------------------------------------------
# Sequences to train on


def pack(lengths, seq_len, generator):
    """The sequence of each piece (of length 1 to seq_len), and the number of sequences: best-fit
    decreasing.

    The longest pieces go first, each into the fullest sequence that has room, or else into a new
    one; the generator draws which of the pieces of one length meet. A million pieces take about two
    seconds."""
    order = generator.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    sequence_of, num_sequences = np.empty(len(lengths), np.int64), 0
    rooms = []  # room left in some sequence, ascending
    with_room = defaultdict(list)  # room -> the sequences that have it
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        fullest = bisect.bisect_left(rooms, length)
        if fullest == len(rooms):
            sequence, room, num_sequences = num_sequences, seq_len, num_sequences + 1
        else:
            room = rooms[fullest]
            sequence = with_room[room].pop()
            if not with_room[room]:
                del rooms[fullest]
        sequence_of[piece] = sequence
        if room := room - length:
            if not with_room[room]:
                bisect.insort(rooms, room)
            with_room[room].append(sequence)
    return sequence_of, num_sequences


class TokenData:
    """A corpus as an endless series of sequences. Sequence i depends only on the corpus, seq_len,
    the seed and i.

    Sequences are packed once, by the seed; epoch e takes all of them in an order drawn by (seed,
    e). A document of n tokens is n - 1 pairs of a token and the next. One of more than seq_len
    pairs is cut into pieces of seq_len and a rest: no pair is lost, only the context before a cut.

    Public: sequences_per_epoch; documents, tokens: of the whole corpus; counted: targets an epoch
    trains on; padding: share of an epoch's places that hold no pair; tokenizer: its name;
    vocab_size; identity: a text that differs where the corpus does."""

    def __init__(self, path, seq_len, *, seed=0, vocab_size=None):
        """`vocab_size` is the model's: ValueError if the corpus was encoded with a larger one."""
        for name, value, least in (("seq_len", seq_len, 2), ("seed", seed, 0)):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}={value!r}: needs a whole number, {least} or more")
        opened = open_corpus(path)
        tokenizer, self.stream, documents, self.counted_stream, self.identity, targets = opened
        self.path, self.seq_len, self.seed = path, seq_len, seed
        self.tokenizer, self.vocab_size = tokenizer.name, tokenizer.vocab_size
        if vocab_size is not None and self.vocab_size > vocab_size:
            raise ValueError(
                f"{path}: encoded by {self.tokenizer} with a vocabulary of {self.vocab_size}, but "
                f"the model has vocab_size={vocab_size}: encode it with another --tokenizer, or "
                "train another model"
            )

        starts, pairs = documents[:-1], np.diff(documents) - 1
        self.documents, self.tokens = len(pairs), len(self.stream)
        self.counted = int(targets.sum())
        if not self.counted:
            raise ValueError(
                f"{path}: has no target to train on in {self.documents} documents: use other data "
                "(data.py --show=3 marks what is counted)"
            )

        pieces = -(-pairs // seq_len)
        before = np.repeat(np.cumsum(pieces) - pieces, pieces)  # pieces of earlier documents
        offsets = (np.arange(pieces.sum()) - before) * seq_len  # of each piece in its document
        lengths = np.minimum(np.repeat(pairs, pieces) - offsets, seq_len)
        sequence_of, self.sequences_per_epoch = pack(lengths, seq_len, np.random.default_rng(seed))
        by_sequence = np.argsort(sequence_of, kind="stable")
        self.piece_starts = (np.repeat(starts, pieces) + offsets)[by_sequence]
        self.piece_lengths = lengths[by_sequence]
        self.first_pieces = np.searchsorted(  # of each sequence, in the two above
            sequence_of[by_sequence], np.arange(self.sequences_per_epoch + 1)
        )
        self.padding = 1 - int(lengths.sum()) / (self.sequences_per_epoch * seq_len)
        self.epoch, self.epoch_order = None, None

    def describe(self):
        return (
            f"{self.path}: {self.documents:,} documents, {self.tokens:,} tokens "
            f"({self.tokenizer}), {self.counted:,} counted; {self.sequences_per_epoch:,} sequences "
            f"of {self.seq_len:,}, {self.padding:.2%} padding"
        )

    def pieces(self, index):
        """Where each piece of sequence `index` starts in the stream, and its length."""
        epoch, place = divmod(int(index), self.sequences_per_epoch)
        if epoch != self.epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.sequences_per_epoch)
            self.epoch, self.epoch_order = epoch, order
        sequence = self.epoch_order[place]
        pieces = slice(self.first_pieces[sequence], self.first_pieces[sequence + 1])
        return self.piece_starts[pieces], self.piece_lengths[pieces]

    def batch(self, indices):
        """Sequences by their numbers (0, 1, ..., in any order) -> tokens, targets, documents, each
        (len(indices), seq_len) int64. OSError if the corpus can no longer be read.

        targets[b, i] is the token after tokens[b, i]; -100 where the loss does not count it, and on
        padding, which comes last. documents[b, i] numbers the pieces of a sequence from 0. Padding
        has the number of the last piece, which cannot see it: a sequence of one piece is all zeros,
        and needs no mask but the causal one."""
        import torch  # here, because it takes seconds, and writing a corpus needs none of it

        shape = (len(indices), self.seq_len)
        tokens, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        for b, index in enumerate(indices):
            place = 0
            for number, (start, length) in enumerate(
                zip(*map(np.ndarray.tolist, self.pieces(index)))
            ):
                piece = self.stream[start : start + length + 1].astype(np.int64)
                counted = self.counted_stream[start + 1 : start + length + 1] != 0
                here = slice(place, place + length)
                tokens[b, here], documents[b, place:] = piece[:-1], number
                targets[b, here] = np.where(counted, piece[1:], IGNORED)
                place += length
        return torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents)


# --------------------------------------------------------------------------------------------------
# The command


def mark(tokens, counted, tokenizer, colour):
    """The text of a document, with what the loss counts in green or in [[ ]]."""
    before, after = ("\x1b[32m", "\x1b[0m") if colour else ("[[", "]]")
    length, pieces = len(tokens), []
    tokens, counted = tokens[:SHOWN], np.asarray(counted[:SHOWN]) != 0
    for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(counted)) + 1):
        text = tokenizer.decode(tokens[run].tolist())
        # no document may send commands to the terminal
        text = "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
        pieces.append(before + text + after if counted[run[0]] else text)
    more = f" ... and {length - SHOWN:,} tokens more" if length > SHOWN else ""
    return "".join(pieces) + more


def show(documents, number, tokenizer):
    """Print the first documents, given as (name, tokens, counted)."""
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for name, tokens, counted in itertools.islice(documents, number):
        print(f"--- {name}: {len(tokens):,} tokens, {np.count_nonzero(counted):,} of them counted")
        print(mark(tokens, counted, tokenizer, colour))


def documents_of(folder):
    """(name, tokens, counted) of each document of a corpus."""
    _, tokens, documents, counted, _ = open_folder(folder)
    for number, (a, b) in enumerate(itertools.pairwise(documents.tolist())):
        yield f"{folder}, document {number}", tokens[a:b], counted[a:b]


def first_documents(options):
    """(name, tokens, counted) of the first documents of the inputs, which are encoded for it."""
    files = [file for path in options.inputs for file in find_files(path)]
    documents = itertools.islice(read_documents(files, options.separator), options.show)
    settings = {"history": options.history, "ignore": tuple(options.ignore)}
    for where, result in encode_all(documents, 1, tokenizer=options.tokenizer, **settings):
        if isinstance(result, str):
            raise ValueError(result)
        yield where, result[0], result[1]


def parse_options(arguments):
    parser = argparse.ArgumentParser(
        description="Encode texts and chats into a corpus to train on.", allow_abbrev=False
    )
    add = parser.add_argument
    add("inputs", nargs="*", help="files, folders, or names of data sets of the Hub")
    add("--out", help="the folder to write")
    add("--mix", nargs="+", default=[], metavar="INPUT=WEIGHT", help="inputs by share of tokens")
    add("--tokenizer", default=HarmonyTokenizer.name, choices=TOKENIZERS, help="%(default)s")
    add("--history", default="keep", choices=["keep", "drop"], help="reasoning of earlier turns")
    add("--val", type=float, default=0, help="share of documents that goes to OUT-val: 0.01")
    add("--max_records", type=int, help="of all inputs, or of each with --mix")
    add("--skip_bad", type=int, default=0, help="go on over as many bad records, and print them")
    add("--separator", help="between the documents of a .txt: '<|endoftext|>'")
    add("--ignore", action="append", default=[], help="a column that is no part of the chat")
    add("--show", type=int, default=0, help="print the first documents, what is counted marked")
    add("--seq_len", type=int, help="also say how the documents fill sequences of this length")
    options = parser.parse_args(arguments)
    options.weights = None
    if bool(options.inputs) == bool(options.mix):
        parser.error("needs either inputs or --mix")
    if options.mix:
        options.weights = []
        for text in options.mix:
            path, _, weight = text.rpartition("=")
            try:
                options.weights.append(float(weight))
            except ValueError:
                options.weights.append(0)
            if not path or not 0 < options.weights[-1] < 1e9:
                parser.error(f"--mix {text}: needs INPUT=WEIGHT, such as a.jsonl=2")
            options.inputs.append(path)
    for name, least in (("seq_len", 2), ("max_records", 1), ("skip_bad", 0), ("show", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name}={value}: {least} or more")
    if not 0 <= options.val < 1:
        parser.error(f"--val={options.val}: a share, 0 or more and less than 1")
    if options.separator == "":
        parser.error("--separator: needs a text")
    if not options.out and not options.show:
        parser.error("needs --out, the folder to write, or --show=3 to look only")
    return options


def run(options):
    first = Path(options.inputs[0])
    if not options.out and len(options.inputs) == 1 and (first / "meta.json").is_file():
        show(documents_of(first), options.show, get_tokenizer(open_folder(first)[0].name))
        return
    if not options.out:
        show(first_documents(options), options.show, get_tokenizer(options.tokenizer))
        return
    meta = write_corpus(
        options.inputs,
        options.out,
        options.tokenizer,
        weights=options.weights,
        history=options.history,
        val=options.val,
        max_records=options.max_records,
        skip_bad=options.skip_bad,
        separator=options.separator,
        ignore=options.ignore,
        say=tqdm.write,
    )
    print(
        f"{options.out}: {meta['documents']:,} documents, {meta['tokens']:,} tokens, "
        f"{meta['counted']:,} counted"
    )
    if options.seq_len is not None:
        print(TokenData(options.out, options.seq_len).describe())
    show(documents_of(options.out), options.show, get_tokenizer(options.tokenizer))


def main(arguments=None):
    try:
        run(parse_options(arguments))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (ValueError, OSError) as error:
        raise SystemExit(f"data.py: {error}") from None


if __name__ == "__main__":
    main()
