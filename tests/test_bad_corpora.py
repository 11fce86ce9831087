"""data.py: what it says of corpora and options that are wrong."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpora import (
    set_meta,
    write_folder,
)
from data import TokenData


def damaged(change):
    """A folder that `change` has damaged, as a function of where to make it."""

    def make(path):
        write_folder(path, [5, 6], counted=[0, 1] * 5 + [1])
        change(path)
        return str(path)

    return make


def truncate(name, size):
    return damaged(lambda path: os.truncate(path / name, size))


def meta(**changes):
    return damaged(lambda path: set_meta(path, **changes))


def store(name, dtype, *values):
    return damaged(lambda path: np.array(values, dtype).tofile(path / name))


def remove(name):
    return damaged(lambda path: os.remove(path / name))


def text(name, content):
    return damaged(lambda path: (path / name).write_text(content))


BAD_CORPORA = {
    "no folder": (lambda path: str(path), "meta.json: no such file.*data.py"),
    "no meta.json": (remove("meta.json"), "meta.json: no such file"),
    "no tokens.bin": (remove("tokens.bin"), "tokens.bin: no such file"),
    "no documents.bin": (remove("documents.bin"), "documents.bin: no such file"),
    "no counted.bin": (remove("counted.bin"), "counted.bin: no such file"),
    "tokens.bin cut": (truncate("tokens.bin", 40), "tokens.bin: 40 bytes .* 44"),
    "tokens.bin cut in a token": (truncate("tokens.bin", 43), "tokens.bin: 43 bytes .* 44"),
    "tokens.bin empty": (truncate("tokens.bin", 0), "tokens.bin: 0 bytes"),
    "uint16 tokens": (store("tokens.bin", "<u2", *range(11)), "tokens.bin: 22 bytes .* 44"),
    "documents.bin cut": (truncate("documents.bin", 16), "documents.bin: 16 bytes .* 24"),
    "counted.bin cut": (truncate("counted.bin", 10), "counted.bin: 10 bytes .* 11"),
    "id past the vocabulary": (
        store("tokens.bin", "<u4", *[3] * 10, 257),
        "tokens.bin: token 257 is outside bytes's 257",
    ),
    "negative id": (store("tokens.bin", "<i4", -1, *[3] * 10), "token 4294967295"),
    "late first document": (
        store("documents.bin", "<u8", 1, 5, 11),
        "documents.bin: must rise from 0 to 11",
    ),
    "wrong end": (store("documents.bin", "<u8", 0, 5, 12), "documents.bin: must rise"),
    "falling": (store("documents.bin", "<u8", 0, 12, 11), "documents.bin: must rise"),
    "empty document": (store("documents.bin", "<u8", 0, 0, 11), "documents.bin: must rise"),
    "huge offset": (store("documents.bin", "<u8", 0, 2**64 - 5, 11), "documents.bin: must rise"),
    "first tokens alone counted": (
        damaged(lambda path: write_folder(path, [5, 6], counted=[1, *[0] * 4, 1, *[0] * 5])),
        "no target to train on in 2 documents",
    ),
    "meta is no JSON": (text("meta.json", "{"), "meta.json: is not what data.py writes"),
    "meta is nested": (text("meta.json", "[" * 60_000), "meta.json: is not what data.py writes"),
    "meta is a list": (text("meta.json", "[]"), "meta.json: is not what data.py writes"),
    "meta lacks": (
        text("meta.json", '{"tokenizer": "bytes"}'),
        "meta.json: is not what data.py writes",
    ),
    "unknown tokenizer": (meta(tokenizer="../gpt2"), "meta.json: is not what data.py writes"),
    "tokenizer is a list": (meta(tokenizer=["bytes"]), "meta.json: is not what data.py writes"),
    "tokens are a float": (meta(tokens=11.0), "meta.json: is not what data.py writes"),
    "documents are true": (meta(documents=True), "meta.json: is not what data.py writes"),
    "checksum is a number": (meta(checksum=5), "meta.json: is not what data.py writes"),
    "infinite": (meta(tokens=float("inf")), "meta.json: is not what data.py writes"),
    "negative": (meta(documents=-1), "meta.json: .*the corpus is empty"),
    "astronomic": (meta(tokens=10**30), "tokens.bin: 44 bytes"),
    "large": (meta(tokens=2**47), "tokens.bin: 44 bytes"),
    "other count of documents": (meta(documents=3), "documents.bin: 24 bytes .* 32"),
    "no documents": (meta(documents=0), "meta.json: .*the corpus is empty"),
    "no tokens": (meta(tokens=0), "meta.json: .*the corpus is empty"),
}


@pytest.mark.parametrize("make, message", BAD_CORPORA.values(), ids=BAD_CORPORA)
def test_bad_corpus_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message) as error:
        TokenData(make(tmp_path / "corpus"), 4)
    assert str(tmp_path / "corpus") in str(error.value)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seq_len": 1}, "seq_len=1: .* 2 or more"),
        ({"seq_len": 4.0}, "seq_len=4.0"),
        ({"seq_len": True}, "seq_len=True"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": None}, "seed=None"),
        ({"vocab_size": 256}, "vocabulary of 257, but the model has vocab_size=256"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TokenData("pydoc", **{"seq_len": 4, **options})


def test_documents_without_a_target(tmp_path):
    """Those of one token have none, whatever is counted."""
    with pytest.raises(ValueError, match="c: has no target to train on in 2 documents: use other"):
        TokenData(write_folder(tmp_path / "c", [1, 1]), 4)


def test_the_largest_fitting_vocabulary_is_accepted(tmp_path):
    assert TokenData(write_folder(tmp_path / "c", [300]), 4, vocab_size=257).vocab_size == 257


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["bytes", "o200k_harmony", "11", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=100, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(["tokenizer", "tokens", "documents", "checksum"]), ODD),
    instead=st.none() | ODD,
)
def test_meta_of_any_type_is_one_line(tmp_path_factory, changes, instead):
    """json.dumps writes NaN and Infinity; 1e999 is infinite when it is read."""
    path = tmp_path_factory.mktemp("corpus")
    folder = write_folder(path, [5, 6])
    set_meta(path, **changes)
    if instead is not None:
        text = json.dumps(instead).replace("Infinity", "1e999")
        (path / "meta.json").write_text(text)
    try:
        read = TokenData(folder, 4)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert (read.tokens, read.documents) == (11, 2)
