"""The corpus on disk and the sequences it becomes: what is written is what is read, every pair of
tokens exactly once."""

import json
import os
import shutil

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import fast
from corpora import (
    VOCABULARY_FILE,
    command_line,
    need_vocabulary,
    write_folder,
    write_jsonl,
)
from data import TokenData, pack, write_corpus
from loop.checks import check_data
from loop.options import Options
from model import GPTOSSConfig
from text import corpus
from text.tokenizer import HarmonyTokenizer, get_tokenizer


@pytest.fixture
def vocabulary():
    need_vocabulary()
    return get_tokenizer("o200k_harmony")


# --------------------------------------------------------------------------------------------------
# Tokenizers


def test_bytes_round_trip():
    tokenizer = get_tokenizer("bytes")
    text = "naïve\n日本 \x00 <|endoftext|>"
    assert tokenizer.encode(text) == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([104, 105, 256]) == "hi<|endoftext|>"
    assert tokenizer.decode([0xC3]) == "\ufffd"  # half a letter, as a model may sample
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)


def test_a_token_without_text_is_no_error(vocabulary):
    """A model's vocabulary may be larger than its tokenizer's."""
    for tokenizer in (vocabulary, get_tokenizer("bytes")):
        last = tokenizer.vocab_size - 1
        assert tokenizer.decode([last]).startswith("<|")
        assert tokenizer.decode([last + 1, 10**12, -1]) == "\ufffd" * 3


def test_o200k_round_trip_and_no_forged_specials(vocabulary):
    text = "Hello, 日本! <|endoftext|><|start|>assistant"
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert max(ids) < 199_998  # the special tokens start there
    assert vocabulary.decode([vocabulary.end]) == "<|endoftext|>"
    assert vocabulary.vocab_size == vocabulary.vocabulary.n_vocab


# --------------------------------------------------------------------------------------------------
# Writing


@pytest.mark.parametrize("name", ["bytes", "o200k_harmony"])
def test_files_hold_the_documents_in_order(tmp_path, name):
    if name == "o200k_harmony":
        need_vocabulary()
    tokenizer = get_tokenizer(name)
    texts = [f"document {i} é\n" * (i % 7 + 1) for i in range(3000)] + ["<|endoftext|>"]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": text, "id": 1} for text in texts])
    (tmp_path / "b.TXT").write_bytes(b"\xef\xbb\xbfone\r\n\r\nfile")  # with a byte order mark
    meta = write_corpus([jsonl, str(tmp_path / "b.TXT"), jsonl], str(tmp_path / "out") + "/", name)
    texts = texts + ["one\r\n\r\nfile"] + texts

    folder = tmp_path / "out"
    tokens = np.fromfile(folder / "tokens.bin", "<u4")
    ends = np.fromfile(folder / "documents.bin", "<u8").astype(np.int64)
    read = [tokens[a:b].tolist() for a, b in zip(ends, ends[1:])]
    assert [tokenizer.decode(ids[:-1]) for ids in read] == texts
    assert all(ids[-1] == tokenizer.end and tokenizer.end not in ids[:-1] for ids in read)
    assert json.loads((folder / "meta.json").read_text()) == meta
    assert meta["documents"] == len(texts) and meta["tokens"] == meta["counted"] == len(tokens)
    assert sorted(os.listdir(folder)) == ["counted.bin", "documents.bin", "meta.json", "tokens.bin"]
    assert np.fromfile(folder / "counted.bin", "u1").tolist() == [1] * len(tokens)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "b.TXT", "out"]


@pytest.mark.parametrize("cores", [1, 3])
def test_workers_do_not_change_the_order(tmp_path, monkeypatch, cores):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    texts = ["slow " * 300_000] + [
        f"{i} " * 200_000 for i in range(5)
    ]  # each a batch; the first takes longest
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    write_corpus([path], str(tmp_path / "out"), "bytes")
    tokens = np.fromfile(tmp_path / "out" / "tokens.bin", "<u4")
    ends = np.cumsum([len(text) + 1 for text in texts])
    assert np.fromfile(tmp_path / "out" / "documents.bin", "<u8").tolist() == [0, *ends.tolist()]
    assert (tokens[ends - 1] == 256).all()
    assert (tokens[tokens < 256].astype("u1").tobytes()) == "".join(texts).encode()


BAD_LINES = {  # the second line of a file -> what the error says of it
    "not JSON": (b"{text: 1}", "not JSON: .* column 2"),
    "cut short": (b'{"text": "a', "not JSON"),
    "no object": (b'["text"]', 'either "text" or "messages"'),
    "neither": (b'{"content": "a"}', 'either "text" or "messages"'),
    "both": (b'{"text": "a", "messages": []}', 'either "text" or "messages"'),
    "text is no string": (b'{"text": 7}', '"text" must be a string'),
    "text is null": (b'{"text": null}', 'either "text" or "messages"'),
    "text is empty": (b'{"text": ""}', "the text is empty"),
    "not UTF-8": (b'{"text": "\xff"}', "'utf-8' codec can't decode"),
    "half a surrogate": (b'{"text": "\\ud800"}', "surrogates not allowed"),
    "nested": (b'{"text": ' + b"[" * 200_000, "maximum recursion"),
}


@pytest.mark.parametrize("line, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named_and_nothing_is_left(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"a.jsonl:3: .*{message}"):
        write_corpus([str(path)], str(tmp_path / "out"), "bytes")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_half_a_surrogate_is_no_text_for_tiktoken_either(tmp_path, vocabulary):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(ValueError, match="a.jsonl:1: .*surrogates not allowed"):
        write_corpus([str(tmp_path / "a.jsonl")], str(tmp_path / "out"))


def test_bad_inputs_and_outputs(tmp_path):
    good = write_jsonl(tmp_path / "good.jsonl", [{"text": "good"}])
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "good.csv").write_text("a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("mine")
    before = sorted(os.listdir(tmp_path))
    for arguments, error, message in [
        (["empty.txt", "out", "bytes"], ValueError, "empty.txt: the text is empty"),
        (["mark.txt", "out", "bytes"], ValueError, "mark.txt: the text is empty"),
        (["blank.jsonl", "out", "bytes"], ValueError, "blank.jsonl: no document"),
        (["latin.txt", "out", "bytes"], ValueError, "latin.txt: 'utf-8' codec"),
        (["absent.txt", "out", "bytes"], OSError, "No such file.*absent.txt"),
        (["folder.jsonl", "out", "bytes"], ValueError, "folder.jsonl: holds no .txt"),
        (["good.csv", "out", "bytes"], ValueError, "good.csv: needs to be a .txt"),
        (["good.jsonl", "full", "bytes"], ValueError, "full exists and is not empty"),
        (["good.jsonl", "good.csv", "bytes"], ValueError, "good.csv exists and is not empty"),
        (["good.jsonl", "good.csv/out", "bytes"], OSError, "File exists.*good.csv"),
        (["good.jsonl", "out", "gpt2"], ValueError, "tokenizer='gpt2' .* o200k_harmony, bytes"),
    ]:
        with pytest.raises(error, match=message):
            write_corpus([str(tmp_path / arguments[0])], str(tmp_path / arguments[1]), arguments[2])
        assert sorted(os.listdir(tmp_path)) == before, arguments
    assert os.listdir(tmp_path / "full") == ["kept"]
    assert write_corpus([good], str(tmp_path / "out"), "bytes")["tokens"] == 5


def test_command_line(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "abcd"}, {"text": "ef"}, {"text": "ghi"}])
    done = command_line(path, "--out", tmp_path / "out", "--tokenizer=bytes", "--seq_len=5")
    assert done.returncode == 0, done.stderr
    assert "3 documents, 12 tokens, 12 counted" in done.stdout
    told = "12 tokens (bytes), 9 counted; 2 sequences of 5, 10.00% padding\n"
    assert told in done.stdout
    assert "100%" in done.stderr  # the bar

    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": 1}\n')
    failed = command_line(path, "--out", tmp_path / "new", "--tokenizer=bytes")
    assert failed.returncode == 1 and "a.jsonl:2:" in failed.stderr
    assert "Traceback" not in failed.stderr
    for arguments, message in [
        ((path, "--out", tmp_path / "new", "--tokenizer=bytes"), "a.jsonl:2:"),
        ((path, "--out", tmp_path / "out", "--tokenizer=bytes"), "exists and is not empty"),
        ((path, "--out", tmp_path / "new", "--tokenizer=byte"), "invalid choice: 'byte'"),
        ((path, "--out", tmp_path / "new", "--tok=bytes"), "--tok=bytes"),
        ((path,), "--out"),
    ]:
        with pytest.raises(SystemExit) as stop:  # its text, or what argparse printed before 2
            data.main(list(map(str, arguments)))
        assert message in f"{stop.value} {capsys.readouterr().err}", arguments
        assert stop.value.code not in (0, None)
        assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out"]


def test_vocabulary_out_of_reach_says_what_to_do(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    proxy = {
        "https_proxy": "http://127.0.0.1:9",
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "no_proxy": "",
    }  # nobody answers
    failed = command_line(
        path, "--out", tmp_path / "out", TIKTOKEN_CACHE_DIR=str(tmp_path / "none"), **proxy
    )
    assert (
        failed.returncode == 1
        and "TIKTOKEN_CACHE_DIR" in failed.stderr
        and "--tokenizer=bytes" in failed.stderr
    )
    assert not (tmp_path / "out").exists() and failed.stderr.strip().count("\n") == 0


def test_a_damaged_vocabulary_is_one_line(tmp_path, monkeypatch):
    """tiktoken removes what has the wrong checksum and downloads it again, which fails here."""
    (tmp_path / VOCABULARY_FILE).write_bytes(b"x")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    with pytest.raises(OSError, match="cannot load the o200k_harmony vocabulary") as error:
        HarmonyTokenizer()
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# Sequences


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seq_len=st.integers(2, 24),
    seed=st.integers(0, 2**32),
    marks=st.none() | st.integers(0, 2**32),
)
def test_every_pair_once(tmp_path_factory, lengths, seq_len, seed, marks):
    total = sum(lengths)
    counted = None if marks is None else np.random.default_rng(marks).integers(0, 2, total)
    folder = write_folder(tmp_path_factory.mktemp("corpus"), lengths, counted)
    starts = np.cumsum([0, *lengths])

    def expected():  # each document cut into pieces, as a reader would by hand
        for start, end in zip(starts, starts[1:]):
            for first in range(start, end - 1, seq_len):
                last = min(first + seq_len, end - 1)
                inputs = [i % 257 for i in range(first, last)]
                shifted = range(first + 1, last + 1)
                yield inputs, [i % 257 if counted is None or counted[i] else -100 for i in shifted]

    pieces = list(expected())
    count = sum(target != -100 for _, targets in pieces for target in targets)
    if not count:
        with pytest.raises(ValueError, match=f"no target to train on in {len(lengths)} documents"):
            TokenData(folder, seq_len, seed=seed)
        return
    read = TokenData(folder, seq_len, seed=seed)
    tokens, targets, documents = read.batch(range(read.sequences_per_epoch))
    found, padding = [], 0
    for b in range(read.sequences_per_epoch):
        steps = documents[b].diff()
        assert documents[b, 0] == 0 and ((steps == 0) | (steps == 1)).all()
        begins = read.pieces(b)[1]
        for piece in range(int(documents[b, -1]) + 1):
            here = documents[b] == piece
            pair = (tokens[b][here].tolist(), targets[b][here].tolist())
            assert not any(pair[0][begins[piece] :]) and set(pair[1][begins[piece] :]) <= {
                -100
            }  # padding
            padding += len(pair[0]) - begins[piece]
            assert (
                piece == len(begins) - 1 or len(pair[0]) == begins[piece]
            )  # only after the last one
            found.append(tuple(part[: begins[piece]] for part in pair))
    assert sorted(found) == sorted(pieces)
    assert read.counted == count == int((targets != -100).sum())
    assert read.padding == pytest.approx(padding / tokens.numel(), abs=1e-12)
    assert (read.documents, read.tokens) == (len(lengths), total)


def test_a_long_document_is_cut_and_keeps_every_target(tmp_path):
    read = TokenData(write_folder(tmp_path / "c", [11, 3], seed=50), 4)
    tokens, targets, documents = read.batch(range(3))
    order = tokens[:, 0].argsort()
    assert tokens[order].tolist() == [[50, 51, 52, 53], [54, 55, 56, 57], [58, 59, 61, 62]]
    assert targets[order].tolist() == [[51, 52, 53, 54], [55, 56, 57, 58], [59, 60, 62, 63]]
    assert documents[order].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert read.describe().endswith("12 counted; 3 sequences of 4, 0.00% padding")


def test_a_short_document_is_padded(tmp_path):
    read = TokenData(write_folder(tmp_path / "c", [3], seed=61), 4)
    assert [x.tolist() for x in read.batch([0])] == [
        [[61, 62, 0, 0]],
        [[62, 63, -100, -100]],
        [[0, 0, 0, 0]],
    ]
    assert read.describe().endswith("2 counted; 1 sequences of 4, 50.00% padding")


def test_a_sequence_depends_on_its_number_alone():
    one, other = TokenData("pydoc", 64, seed=3), TokenData("pydoc", 64, seed=3)
    n = one.sequences_per_epoch
    numbers = [5, 0, 2 * n + 1, n - 1, n, 5, 10**7]
    together = one.batch(numbers)
    for place, number in reversed(
        list(enumerate(numbers))
    ):  # another order, one at a time, over epochs
        for whole, single in zip(together, other.batch([number])):
            assert torch.equal(whole[place], single[0])
    epochs = [one.batch(range(e * n, (e + 1) * n))[0] for e in (0, 1)]
    assert not torch.equal(*epochs)
    assert sorted(epochs[0].tolist()) == sorted(
        epochs[1].tolist()
    )  # an epoch takes every sequence once
    other_seed = TokenData("pydoc", 64, seed=4)  # packs otherwise, not only in another order
    assert sorted(other_seed.batch(range(other_seed.sequences_per_epoch))[0].tolist()) != sorted(
        epochs[0].tolist()
    )


@settings(max_examples=200, deadline=None)
@given(
    seq_len=st.integers(2, 50),
    sizes=st.lists(st.integers(1, 50), max_size=200),
    seed=st.integers(0, 100),
)
def test_pack_is_best_fit_decreasing(seq_len, sizes, seed):
    lengths = np.array([min(size, seq_len) for size in sizes], np.int64)
    sequence_of, num_sequences = pack(lengths, seq_len, np.random.default_rng(seed))
    filled = np.bincount(sequence_of, lengths, num_sequences)
    assert (filled <= seq_len).all() and (filled > 0).all()
    if num_sequences > 1:  # the two emptiest sequences do not fit into one
        assert np.sort(filled)[:2].sum() > seq_len
    # the textbook's loop, one piece at a time
    rooms = []
    for size in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= size]
        room = min(fitting) if fitting else seq_len
        if fitting:
            rooms.remove(room)
        rooms.append(room - size)
    assert num_sequences <= len(rooms) + 1


def test_packing_wastes_little():
    generator = np.random.default_rng(0)
    lengths = np.clip(np.exp(generator.normal(6, 1.2, 50_000)), 1, 4096).astype(np.int64)
    _, num_sequences = pack(lengths, 4096, generator)
    assert 1 - lengths.sum() / (num_sequences * 4096) < 0.002


def test_built_in_corpora():
    train, held_out = TokenData("pydoc", 256), TokenData("pydoc-val", 256)
    assert train.tokens > 300_000 and held_out.tokens > 10_000
    assert train.padding < 0.02 and train.vocab_size == 257 and train.tokenizer == "bytes"

    def lines(held_out):
        text = get_tokenizer("bytes").decode(corpus.open_pydoc(held_out)[1].tolist())
        return {line.strip() for line in text.splitlines() if len(line.strip()) >= 30}

    assert len(lines(True) & lines(False)) < 0.02 * len(lines(True))  # held out means not seen


# --------------------------------------------------------------------------------------------------
# A corpus in use


@pytest.mark.parametrize("name", ["tokens.bin", "counted.bin"])
@pytest.mark.parametrize("left", [0, 7])
def test_a_file_cut_in_use_is_one_line(tmp_path, name, left):
    """Not SIGBUS: what is no longer there is missed when it is read."""
    read = TokenData(write_folder(tmp_path / "c", [300] * 3), 50)
    whole = read.batch(range(read.sequences_per_epoch))
    os.truncate(tmp_path / "c" / name, left)
    with pytest.raises(OSError, match=f"{name}: {left} bytes .* cut while in use") as error:
        read.batch(range(read.sequences_per_epoch))
    assert "\n" not in str(error.value)
    # A corpus that is replaced, as data.py does, goes on being read as it was.
    os.rename(tmp_path / "c", tmp_path / "d")
    read = TokenData(write_folder(tmp_path / "c", [300] * 3), 50)
    os.rename(tmp_path / "c", tmp_path / "e")
    again = read.batch(range(read.sequences_per_epoch))
    assert all(torch.equal(a, b) for a, b in zip(whole, again))


def test_a_read_error_names_the_file(tmp_path, monkeypatch):
    read = TokenData(write_folder(tmp_path / "c", [300]), 50)

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error: '.*tokens.bin'"):
        read.batch([0])


def test_short_reads_are_continued(tmp_path, monkeypatch):
    read = TokenData(write_folder(tmp_path / "c", [300]), 50)
    whole, pread = read.batch([0, 1]), os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, place: pread(file, min(size, 7), place))
    assert all(torch.equal(a, b) for a, b in zip(whole, read.batch([0, 1])))


def identity(path):
    return TokenData(str(path), 4).identity


def test_identity_tells_corpora_of_equal_size_apart(tmp_path):
    folders = {}
    for name, texts in {"a": ["abcd", "ef"], "b": ["abcd", "eg"], "c": ["abc", "def"]}.items():
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        write_corpus([path], str(tmp_path / name), "bytes")
        folders[name] = tmp_path / name
    answer = {"role": "assistant", "content": "ab"}
    for name, weight in {"d": 1, "e": 0}.items():  # what is counted is part of it
        record = {"messages": [{**answer, "weight": weight}, answer]}
        path = write_jsonl(tmp_path / f"{name}.jsonl", [record])
        write_corpus([path], str(tmp_path / name), "bytes")
        folders[name] = tmp_path / name
    assert len({identity(folder) for folder in folders.values()}) == len(folders)
    shutil.copytree(folders["a"], tmp_path / "copy")
    assert identity(tmp_path / "copy") == identity(folders["a"])
    assert TokenData(str(folders["a"]), 3, seed=5).identity == identity(folders["a"])
    assert identity("pydoc") != identity("pydoc-val")


def test_a_corpus_without_a_checksum_has_an_identity_too(tmp_path):
    """Of folders written before there was one: from samples of the tokens."""
    lengths = [30_000] * 20
    one = identity(write_folder(tmp_path / "a", lengths))
    assert one == identity(write_folder(tmp_path / "b", lengths)) and one.startswith("sampled-")
    assert one != identity(write_folder(tmp_path / "c", lengths, seed=1))
    assert one != identity(write_folder(tmp_path / "d", [30_001, 29_999, *lengths[2:]]))


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_counted_targets_are_found_across_chunks(tmp_path, monkeypatch, chunk):
    lengths = [1, 5, 2, 9, 1, 1, 4]
    counted = np.random.default_rng(0).integers(0, 2, sum(lengths))
    folder = write_folder(tmp_path / "c", lengths, counted)
    monkeypatch.setattr(corpus, "SCANNED", chunk)
    *_, targets = corpus.open_corpus(folder)
    parts = np.split(counted, np.cumsum(lengths)[:-1])
    assert targets.tolist() == [part[1:].sum() for part in parts]


def test_what_is_no_corpus_says_how_to_make_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "input.txt").write_text("a")
    (tmp_path / "texts").mkdir()
    for path, message in [
        ("input.txt", "input.txt is a file, .* `python data.py input.txt --out data/input`"),
        ("texts", "texts is no corpus: .* `python data.py texts --out data/texts-tokens`"),
        ("data/none", "data/none/meta.json: no such file. .* --out data/none`"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenData(path, 4)


def test_what_is_not_allowed_is_not_taken_for_absent(tmp_path):
    folder = write_folder(tmp_path / "c", [5])
    os.remove(tmp_path / "c" / "meta.json")
    os.symlink("meta.json", tmp_path / "c" / "meta.json")  # a link to itself: an error of its own
    with pytest.raises(OSError, match="symbolic links"):
        TokenData(folder, 4)


def test_a_held_out_part_is_used_or_told_of(tmp_path, monkeypatch, capsys):
    """What --val kept aside is evaluated; a run without evaluations says that it is there."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} is a number"} for i in range(40)])
    write_corpus(["a.jsonl"], "a", "bytes", val=0.2)
    write_corpus(["a.jsonl"], "b", "bytes")
    sizes = {"vocab_size": 257, "seq_len": 16, "batch_size": 2, "steps": 7}
    config = GPTOSSConfig(vocab_size=257)
    for told, held_out, said in (
        ({"data": "a"}, None, "a-val is there; --eval_every=... evaluates on it"),
        ({"data": "a", "eval_every": 5}, "a-val", ""),
        ({"data": "a", "eval_data": "b"}, "b", ""),
        ({"data": "b"}, None, ""),
    ):
        fast.say.cache_clear()
        _, found = check_data(Options(**sizes, **told), config)
        assert (found and found.path) == held_out
        printed = capsys.readouterr().out
        assert (said in printed) if said else not printed
