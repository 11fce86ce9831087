"""Where documents come from, and what becomes of them on the way: kinds of files, the Hub, bad
lines, workers that die, shares of a mix, what is kept aside, what is shown."""

import gzip
import http.server
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import data
from corpora import ROOT, command_line, need_vocabulary, read_folder, write_jsonl
from data import write_corpus
from text import encode, sources
from text import tokenizer as tokenizers
from text.tokenizer import get_tokenizer

BYTES = get_tokenizer("bytes")


def texts_of(folder):
    return [BYTES.decode(tokens[:-1]) for tokens, _ in read_folder(folder)]


def zstd(content):
    arrow = pytest.importorskip("pyarrow", reason=".zst files are read with pyarrow")
    return arrow.Codec("zstd").compress(content, asbytes=True)


# --------------------------------------------------------------------------------------------------
# Kinds of files

LINES = b'{"text": "one"}\n\n{"text": "two\\n\xc3\xa9", "id": 7}\n{"text": "three"}'
ARRAY = b'\xef\xbb\xbf [\n {"text": "one"}, {"text":\n"two\\n\xc3\xa9"}\n,{"text": "three"} ]\n'
FILES = {
    "a.jsonl": lambda: LINES,
    "mark.jsonl": lambda: b"\xef\xbb\xbf" + LINES,
    "array.jsonl": lambda: ARRAY,
    "array.json": lambda: ARRAY,
    "lines.json": lambda: LINES,
    "values.json": lambda: b'{"text":\n"one"} {"text": "two\\n\\u00e9"}{"text": "three"}',
    "a.JSONL.GZ": lambda: gzip.compress(LINES),
    "two.jsonl.gz": lambda: gzip.compress(LINES[:20]) + gzip.compress(LINES[20:]),
    "a.jsonl.zst": lambda: zstd(LINES),
    "two.jsonl.zst": lambda: zstd(LINES[:20]) + zstd(LINES[20:]),
    "array.json.gz": lambda: gzip.compress(ARRAY),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_holds_the_same_documents_however_it_is_written(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    write_corpus([str(tmp_path / name)], str(tmp_path / "out"), "bytes")
    assert texts_of(tmp_path / "out") == ["one", "two\né", "three"]


def test_parquet(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason=".parquet files are read with pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason=".parquet files are read with pyarrow")
    chats = [
        [{"role": "user", "content": "Q"}, {"role": "assistant", "content": f"A{i}"}]
        for i in range(200)
    ]
    chats[1][1]["thinking"] = "hm"  # a column of structs: null in all other messages
    parquet.write_table(
        arrow.table({"messages": chats, "id": list(range(200)), "tools": [None] * 200}),
        tmp_path / "a.parquet",
        row_group_size=70,
    )
    write_corpus([str(tmp_path / "a.parquet")], str(tmp_path / "out"), "bytes")
    records = [{"messages": chat} for chat in chats]
    write_corpus([write_jsonl(tmp_path / "a.jsonl", records)], str(tmp_path / "same"), "bytes")
    assert texts_of(tmp_path / "out") == texts_of(tmp_path / "same")
    assert "hm" in texts_of(tmp_path / "out")[1]

    parquet.write_table(arrow.table({"text": ["a", None]}), tmp_path / "bad.parquet")
    with pytest.raises(ValueError, match='bad.parquet:2: .*either "text"'):
        write_corpus([str(tmp_path / "bad.parquet")], str(tmp_path / "bad"), "bytes")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.parquet: cannot be read after row 0"):
        write_corpus([str(tmp_path / "cut.parquet")], str(tmp_path / "bad"), "bytes")


def test_a_folder_is_all_that_is_readable_in_it(tmp_path):
    folder = tmp_path / "in"
    for name in ("b/two.jsonl", "a.txt", "README.md", "dataset_infos.json", ".git/x.txt", ".x.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text('{"text": "two"}' if name.endswith("l") else name)
    said = []
    write_corpus([str(folder)], str(tmp_path / "out"), "bytes", say=said.append)
    assert texts_of(tmp_path / "out") == ["a.txt", "two"]
    assert said[0] == f"{folder}: 2 files: {folder}/a.txt, {folder}/b/two.jsonl"
    with pytest.raises(ValueError, match="out: is a corpus already"):
        write_corpus([str(tmp_path / "out")], str(tmp_path / "new"), "bytes")


def test_separator(tmp_path):
    text = "<|endoftext|>one\n\nline<|endoftext|>\n\r\n<|endoftext|>\ntwo\r\n<|endoftext|> \n\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    write_corpus(
        [str(tmp_path / "a.txt")], str(tmp_path / "out"), "bytes", separator="<|endoftext|>"
    )
    assert texts_of(tmp_path / "out") == ["one\n\nline", "two"]
    (tmp_path / "a.txt").write_bytes(b"one\n--\n\n\nb\xff\n--\n")
    with pytest.raises(ValueError, match="a.txt:5: 'utf-8'"):
        write_corpus([str(tmp_path / "a.txt")], str(tmp_path / "bad"), "bytes", separator="--")


BAD_FILES = {  # name, content -> what the error says
    "cut.jsonl.gz": (gzip.compress(os.urandom(3000))[:-9], "cut.jsonl.gz: is cut short or damaged"),
    "none.jsonl.gz": (b"hello", "none.jsonl.gz: is cut short or damaged: Not a gzipped"),
    "bits.jsonl.gz": (
        gzip.compress(LINES)[:15] + b"\0\0\0\0" + gzip.compress(LINES)[19:],
        "bits.jsonl.gz: is cut short or damaged",
    ),
    "none.jsonl.zst": (b"hello", "none.jsonl.zst: "),
    "cut.json": (b'[\n{"text": "a"},\n{"text": ', "cut.json:3: not JSON"),
    "open.json": (b'[{"text": "a"}', "open.json:1: not JSON: the array is cut short"),
    "comma.json": (b'[{"text": "a"}\n{"text": "b"}]', "comma.json:1: not JSON: the array is cut"),
    "more.json": (b'[{"text": "a"}] {"text": "b"}', "more.json: not JSON: .* more follows"),
    "third.json": (b'[{"text": "a"},\n\n{"text": "b"},\n{"x": 1}]', "third.json:4: needs a JSON"),
    "twice.jsonl": (b'{"text": "a", "text": "b"}', "twice.jsonl:1: the key 'text' occurs twice"),
    "latin.json": (b'[{"text": "a"},\n"\xff"]', "latin.json:2: 'utf-8'"),
    "deep.json": (b"[" * 200_000, "deep.json:1: maximum recursion|deep.json:1: not JSON"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_and_leaves_nothing(tmp_path, name):
    content, message = BAD_FILES[name]
    if name.endswith(".zst"):
        pytest.importorskip("pyarrow", reason=".zst files are read with pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message) as error:
        write_corpus([str(tmp_path / name)], str(tmp_path / "out"), "bytes")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == [name]


def test_a_cut_zst_file_is_not_taken_for_a_short_one(tmp_path):
    content = zstd(b"".join(b'{"text": "%d"}\n' % i for i in range(20_000)))
    (tmp_path / "a.jsonl.zst").write_bytes(content[: len(content) // 2])
    with pytest.raises((ValueError, OSError), match="a.jsonl.zst"):
        write_corpus([str(tmp_path / "a.jsonl.zst")], str(tmp_path / "out"), "bytes")
    assert os.listdir(tmp_path) == ["a.jsonl.zst"]


def test_a_fifo_is_refused_before_it_is_opened(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="a.jsonl: is not a regular file"):
        write_corpus([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(ValueError, match=f"{name}: .* needs pyarrow: pip install pyarrow"):
            write_corpus([str(tmp_path / name)], str(tmp_path / "out"), "bytes")


# --------------------------------------------------------------------------------------------------
# The Hub, played by a server of this machine

HUB = {
    "one/part": {"README.md": b"", "data/train-00000-of-00002.jsonl": b'{"text": "a"}'},
    "two/parts": {"train.jsonl": b'{"text": "a"}', "de/test.jsonl.gz": gzip.compress(LINES)},
}
HUB["one/part"]["data/train-00001-of-00002.jsonl"] = b'{"text": "b"}'


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.split("?")[0]
        name = next((name for name in HUB if f"/{name}" in path), None)
        if name is None:
            return self.answer(404, b"{}", "RepoNotFound")
        if path.startswith("/api/"):
            siblings = [{"rfilename": file} for file in HUB[name]]
            tree = [
                {"type": "file", "path": f, "size": len(c), "oid": "0"}
                for f, c in HUB[name].items()
            ]
            about = {"id": name, "sha": "1" * 40, "siblings": siblings}
            return self.answer(200, json.dumps(tree if "/tree/" in path else about).encode())
        self.answer(200, HUB[name][path.split("/resolve/")[1].split("/", 1)[1]])

    do_HEAD = do_GET

    def answer(self, status, content, error=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{abs(hash(content)):x}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    pytest.importorskip("huggingface_hub", reason="data sets of the Hub need huggingface-hub")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.shutdown()


def test_a_data_set_of_the_hub(tmp_path, hub):
    done = command_line("one/part", "--out=x", "--tokenizer=bytes", cwd=tmp_path, **hub)
    assert done.returncode == 0, done.stderr
    assert texts_of(tmp_path / "x") == ["a", "b"]
    assert "one/part: 2 files: one/part/data/train-00000-of-00002.jsonl" in done.stdout
    failed = command_line("no/such", "--out=z", "--tokenizer=bytes", cwd=tmp_path, **hub)
    assert failed.returncode == 1 and failed.stderr.strip().count("\n") == 0
    assert "no such file or folder, and no such data set of the Hub" in failed.stderr
    assert sorted(os.listdir(tmp_path)) == ["cache", "x"]


def test_one_part_of_a_data_set_is_chosen(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="data sets of the Hub need huggingface-hub")
    monkeypatch.setattr(hub.HfApi, "list_repo_files", lambda self, name, **_: list(HUB[name]))
    monkeypatch.setattr(hub, "hf_hub_download", lambda repository, name, **_: f"/cache/{name}")
    assert sources.find_files("two/parts:de/test") == [
        ("two/parts/de/test.jsonl.gz", "/cache/de/test.jsonl.gz")
    ]
    assert sources.find_files("two/parts:t*.jsonl") == [
        ("two/parts/train.jsonl", "/cache/train.jsonl")
    ]
    with pytest.raises(ValueError, match="choose one .* with two/parts:de/test: de/test, train"):
        sources.find_files("two/parts")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two").mkdir()  # so what is missing is one of our own files, and the Hub not asked
    with pytest.raises(FileNotFoundError, match="two/parts"):
        sources.find_files("two/parts")
    os.rmdir(tmp_path / "two")
    with pytest.raises(ValueError, match="has no such part: de/test, train"):
        sources.find_files("two/parts:dev")


@pytest.mark.parametrize(
    "path, part",
    [
        ("data/train-00000-of-00003.parquet", "train"),
        ("data/test_sft-00000-of-00001-a3ecf92756993583.parquet", "test_sft"),
        ("plain_text/train/0000.parquet", "plain_text/train"),
        ("en/train.jsonl.gz", "en/train"),
        ("train_001.jsonl", "train"),
    ],
)
def test_parts_of_a_data_set(path, part):
    assert sources.part_of(path) == part


# --------------------------------------------------------------------------------------------------
# Workers


def one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("how", ["killed", "exits", "panics", "memory"])
def test_a_worker_that_dies_is_one_line_within_seconds(tmp_path, monkeypatch, how):
    """The patched function reaches the workers because they are forked."""
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("workers are not forked here")
    encode_record = encode.encode_record

    class Panic(BaseException):
        pass

    def die(record, *rest):
        if record["text"] == "die":
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "exits":
                os._exit(3)
            raise Panic("called `Result::unwrap()`") if how == "panics" else MemoryError
        return encode_record(record, *rest)

    monkeypatch.setattr(encode, "encode_record", die)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    texts = ["x" * 5000] * 300 + ["die"] + ["y" * 5000] * 300
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    start = time.monotonic()
    with pytest.raises(ValueError, match="a.jsonl:301: ") as error:
        write_corpus([path], str(tmp_path / "out"), "bytes")
    expected = {
        "killed": "died by signal 9",
        "exits": "died with exit code 3",
        "panics": "Panic: called",
        "memory": "MemoryError",
    }
    assert expected[how] in one_line(error) and time.monotonic() - start < 20
    assert os.listdir(tmp_path) == ["a.jsonl"]
    assert multiprocessing.active_children() == []


def test_a_million_blanks(tmp_path, monkeypatch):
    """tiktoken panics on them; in pieces they are text like any other. Shorter runs stay whole."""
    need_vocabulary()
    tokenizer = get_tokenizer("o200k_harmony")
    texts = ["a" + " \t" * 520_000 + "b\n", "a" * 300_000]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    start = time.monotonic()
    write_corpus([path], str(tmp_path / "out"))
    assert time.monotonic() - start < 60
    assert [tokenizer.decode(t[:-1]) for t, _ in read_folder(tmp_path / "out")] == texts
    for text in ("x" + " " * 100_000 + "y", "\n" * 100_001 + "x" + " " * 100_002):
        whole = tokenizer.vocabulary.encode_ordinary(text)
        assert (tokenizer.encode(text) == whole) == (len(text) < 100_100)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # The panic itself, if the text is not cut, is one line.
    monkeypatch.setattr(tokenizers, "LONGEST_BLANK", 10**9)
    if multiprocessing.get_start_method() == "fork":
        with pytest.raises(ValueError, match="a.jsonl:1: PanicException") as error:
            write_corpus([path], str(tmp_path / "new"))
        one_line(error)


def test_a_signal_while_workers_start_is_not_lost():
    """What its handler raises in a hook of a fork would be ignored."""
    due = []
    os.register_at_fork(after_in_parent=lambda: due and signal.raise_signal(due.pop()))

    def handle(number, _):
        raise SystemExit(number)

    for number in encode.SIGNALS:
        due[:], before = [number], signal.signal(number, handle)
        try:
            with pytest.raises(SystemExit, match=str(int(number))):
                list(encode.encode_all([("x:1", "text", b"a")], 2, tokenizer="bytes"))
            assert signal.getsignal(number) is handle and not due
        finally:
            signal.signal(number, before)
        assert multiprocessing.active_children() == []


def started(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "data.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
    return found


def children(pid):
    return open(f"/proc/{pid}/task/{pid}/children").read().split()


@pytest.fixture
def much(tmp_path):
    """A file that takes minutes to encode."""
    with open(tmp_path / "much.jsonl", "w") as file:
        for i in range(300):
            file.write(json.dumps({"text": f"{i} " + "word " * 40_000}) + "\n")
    return tmp_path / "much.jsonl"


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="looks at processes in /proc")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT", "SIGKILL"])
def test_signals_leave_nothing_and_nobody(tmp_path, much, name):
    number = getattr(signal, name)
    process = started(much, "--out", tmp_path / "out", "--tokenizer=bytes", "--val=0.5")
    workers = wait_for(lambda: process.poll() is None and children(process.pid))
    wait_for(lambda: any(path.is_dir() for path in tmp_path.iterdir()))
    if name == "SIGTERM":
        with pytest.raises(ValueError, match="out is being written by process"):
            write_corpus([str(much)], str(tmp_path / "out"), "bytes")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == (-9 if name == "SIGKILL" else 130 if number == 2 else 128 + number)
    assert "Traceback" not in error
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in workers), 20)
    if name != "SIGKILL":
        assert os.listdir(tmp_path) == ["much.jsonl"]
    else:  # what it left does not stop the next, which removes it
        assert sorted(os.listdir(tmp_path)) != ["much.jsonl"]
        small = write_jsonl(tmp_path / "small.jsonl", [{"text": t} for t in "abcdefgh"])
        write_corpus([small], str(tmp_path / "out"), "bytes", val=0.5)
        left = ["much.jsonl", "out", "out-val", "small.jsonl"]
        assert sorted(os.listdir(tmp_path)) == left


def test_folders_of_others_are_left_alone(tmp_path):
    """Process numbers repeat in containers that share a disk: no name is made of one."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for name in (f"out.partial-{os.getpid()}", "out.partial-1", ".other.partial-00000000-00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    before = set(os.listdir(tmp_path))
    write_corpus([path], str(tmp_path / "out"), "bytes")
    assert set(os.listdir(tmp_path)) == before | {"out"}


# --------------------------------------------------------------------------------------------------
# Bad lines, parts, shares


def test_skip_bad_goes_on_over_so_many(tmp_path):
    lines = ['{"text": "a"}', "{", '{"text": "b"}', '{"text": 3}', '{"text": "c"}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said, arguments = [], ([str(tmp_path / "a.jsonl")], str(tmp_path / "out"), "bytes")
    with pytest.raises(ValueError, match="a.jsonl:6: "):
        write_corpus(*arguments, skip_bad=2, say=said.append)
    assert [line.split(":")[1] for line in said] == ["2", "4"]
    assert os.listdir(tmp_path) == ["a.jsonl"]
    write_corpus(*arguments, skip_bad=3, say=said.append)
    assert texts_of(tmp_path / "out") == ["a", "b", "c"] and said[-1] == "3 documents skipped"


def test_max_records(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(3)])
    two = write_jsonl(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(3)])
    write_corpus([one, two], str(tmp_path / "out"), "bytes", max_records=4)
    assert texts_of(tmp_path / "out") == ["a0", "a1", "a2", "b0"]
    write_corpus([one, two], str(tmp_path / "mix"), "bytes", max_records=2, weights=[1, 1])
    assert texts_of(tmp_path / "mix") == ["a0", "a1", "b0", "b1"]


def test_val_keeps_a_part_aside_by_content_alone(tmp_path):
    texts = [f"document {i}" for i in range(2000)] + ["document 7", "document 8"] * 3
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    meta = write_corpus([path], str(tmp_path / "one"), "bytes", val=0.1)
    train, val = texts_of(tmp_path / "one"), texts_of(tmp_path / "one-val")
    assert sorted(train + val) == sorted(texts) and not set(train) & set(val)
    assert 150 < len(val) < 250 and meta["documents"] == len(train)
    assert train == [text for text in texts if text in set(train)]  # in order
    assert read_folder(tmp_path / "one")[0][1] == [1] * len("document 0,")

    other = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in ["new", *reversed(texts)]])
    write_corpus([other], str(tmp_path / "two"), "bytes", val=0.1)
    assert set(texts_of(tmp_path / "two-val")) - {"new"} == set(val)
    write_corpus([path], str(tmp_path / "three"), "bytes", val=0.2)
    assert set(val) < set(texts_of(tmp_path / "three-val"))  # a larger part holds the smaller

    few = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in "abc"])
    write_corpus([few], str(tmp_path / "few"), "bytes", val=0.001)
    assert len(texts_of(tmp_path / "few-val")) == 1  # one at least
    same = write_jsonl(tmp_path / "d.jsonl", [{"text": "a"}] * 3)
    with pytest.raises(ValueError, match="--val=0.5: no document is left to train on"):
        write_corpus([same], str(tmp_path / "same"), "bytes", val=0.5)
    assert not (tmp_path / "same").exists() and not (tmp_path / "same-val").exists()


def test_mix_gives_each_source_its_share_of_the_tokens(tmp_path):
    generator = np.random.default_rng(0)
    words = {
        name: [f"{name}{i}" * int(generator.integers(1, 9)) for i in range(number)]
        for name, number in (("a", 400), ("b", 50), ("c", 2000))
    }
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
        for name, texts in words.items()
    ]
    said = []
    write_corpus(
        paths, str(tmp_path / "out"), "bytes", weights=[2, 1, 1.5], val=0.1, say=said.append
    )
    train, val = texts_of(tmp_path / "out"), texts_of(tmp_path / "out-val")
    assert not set(train) & set(val)
    tokens = {name: sum(len(t) + 1 for t in train if t[0] == name) for name in words}
    total = sum(tokens.values())
    assert [tokens[name] / total for name in words] == pytest.approx(
        [2 / 4.5, 1 / 4.5, 1.5 / 4.5], abs=0.003
    )
    for texts in words.values():
        times = [train.count(text) for text in texts if text not in val]
        assert min(times) >= 1 and max(times) - min(times) <= 1  # nothing is left out
    assert [train.count(text) for text in words["c"] if text not in val] == [1] * (
        len(words["c"]) - sum(text in val for text in words["c"])
    )  # the source that has least to spare is not repeated
    assert len(val) == len(set(val)) and "44.4% of the tokens" in said[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--mix", "a.jsonl", "--out=x"], "needs INPUT=WEIGHT"),
        (["--mix", "a.jsonl=0", "--out=x"], "needs INPUT=WEIGHT"),
        (["--mix", "a.jsonl=nan", "--out=x"], "needs INPUT=WEIGHT"),
        (["a.jsonl", "--mix", "a.jsonl=1", "--out=x"], "either inputs or --mix"),
        (["--out=x"], "either inputs or --mix"),
        (["a.jsonl"], "needs --out"),
        (["a.jsonl", "--out=x", "--val=1"], "--val=1.0"),
        (["a.jsonl", "--out=x", "--val=nan"], "--val=nan"),
        (["a.jsonl", "--out=x", "--max_records=0"], "--max_records=0: 1 or more"),
        (["a.jsonl", "--out=x", "--skip_bad=-1"], "--skip_bad=-1"),
        (["a.jsonl", "--out=x", "--history=forget"], "--history"),
        (["a.jsonl", "--out=x", "--separator="], "--separator"),
        (["a.jsonl", "--out=x", "--seq_len=1"], "--seq_len=1: 2 or more"),
    ],
)
def test_bad_options_are_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# What is shown and told


def test_show_marks_what_is_trained_on_before_and_after(tmp_path, capsys):
    chats = [[("user", "Q\x1b[31m"), ("assistant", f"A{i}")] for i in range(3)]
    records = [
        {"messages": [{"role": role, "content": text} for role, text in chat], "id": 1}
        for chat in chats
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    data.main([path, "--show=2", "--tokenizer=bytes"])
    before = capsys.readouterr().out
    assert os.listdir(tmp_path) == ["a.jsonl"]
    expected = (
        "<|start|>user<|message|>Q\\x1b[31m<|end|><|start|>assistant"
        "[[<|channel|>final<|message|>A{}<|return|><|endoftext|>]]\n"
    )
    texts = "".join(line for line in before.splitlines(True) if not line.startswith("---"))
    assert texts == expected.format(0) + expected.format(1)
    assert "a.jsonl:2: 95 tokens, 40 of them counted" in before

    data.main([path, "--out", str(tmp_path / "out"), "--show=2", "--tokenizer=bytes"])
    told = capsys.readouterr().out
    assert told.endswith(texts.split("\n", 1)[1]) and "ignored: id (3)" in told
    data.main([str(tmp_path / "out"), "--show=9"])
    after = capsys.readouterr().out
    texts = "".join(line for line in after.splitlines(True) if not line.startswith("---"))
    assert texts == "".join(expected.format(i) for i in range(3))


def test_show_is_green_on_a_terminal_and_cuts_long_documents():
    text = BYTES.encode("ab" + "c" * 5000)
    counted = [0, 1] + [0] * 5000
    shown = data.mark(np.array(text), counted, BYTES, colour=True)
    assert shown == "a\x1b[32mb\x1b[0m" + "c" * 1998 + " ... and 3,002 tokens more"


def test_what_is_told(tmp_path):
    """Ignored columns, control tokens, reasoning of earlier turns: each in a line of its own."""

    def turn(answer, thinking=None):
        return [
            {"role": "user", "content": "<|end|>"},
            {"role": "assistant", "content": answer, "thinking": thinking},
        ]

    records = [
        {"messages": turn("a", "hm") + turn("b"), "lang": "en", "id": 1},
        {"messages": turn("a", "hm") + turn("b", "hm"), "lang": None},
        {"text": "one<|endoftext|>two", "url": "x", "id": 2},
        {"messages": [{**turn("a")[1], "weight": 0}]},
    ]
    path, said = write_jsonl(tmp_path / "a.jsonl", records), []
    write_corpus([path], str(tmp_path / "out"), "bytes", say=said.append)
    assert said == [
        "columns that are no part of the text, ignored: id (2), lang (1), url (1)",
        "warning: documents with control tokens as text, which stay text: <|endoftext|> (1), "
        "<|end|> (2): if chats were rendered already, give them as messages; "
        "--separator='<|endoftext|>' divides a .txt there",
        "history=keep: the reasoning of 2 earlier turns is kept and trained on; "
        "in use, prompts hold none: see --history=drop",
        "warning: 1 chats have no answer to train on",
    ]
    said.clear()
    write_corpus([path], str(tmp_path / "drop"), "bytes", history="drop", say=said.append)
    assert (
        "history=drop: the reasoning of 2 earlier turns is left out, as in use; "
        "their answers are not trained on" in said
    )
    assert json.loads((tmp_path / "drop" / "meta.json").read_text())["history"] == "drop"


def test_reading_tells_how_far_it_is(tmp_path):
    """The bytes of every file, compressed, once."""
    for name in ("a.jsonl", "a.jsonl.gz"):
        content = b"".join(b'{"text": "%d"}\n' % i for i in range(50_000))
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        steps = []
        files = sources.find_files(str(tmp_path / name))
        assert sum(1 for _ in sources.read_documents(files, progress=steps.append)) == 50_000
        assert sum(steps) == os.path.getsize(tmp_path / name) and len(set(steps)) > 1
        assert min(steps) >= 0
