"""Bad input to train.py: one line that names the option or file, the value and the fix, before a
GPU has work; a bad exit code; no file made or changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from loop.checks import check_run
from loop.options import parse
from loop.states import checksum
from model import GPTOSS, GPTOSSConfig
from runs import NO_GPU, Run, make_home, train, write_corpus
from weights import INDEX


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With a run of 10 steps, runs/base."""
    folder = make_home(tmp_path_factory.mktemp("bad"))
    train(folder, "tiny.py", "--steps=10", "--save_every=10", "--name=base", ranks=2)
    return folder


# --------------------------------------------------------------------------------------------------
# What is prepared. What these functions make is called bad, bad.py or runs/mine


def config_file(text):
    return lambda home: (home / "bad.py").write_text(text)


def overwrite(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def truncate(name, size):
    return lambda folder: os.truncate(folder / name, size)


def edit(name, **changes):
    def change(folder):
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**old, **changes}))

    return change


def zeros(name):
    return lambda folder: (folder / name).write_bytes(bytes((folder / name).stat().st_size))


def replace(name, old, new):
    return lambda folder: (folder / name).write_text((folder / name).read_text().replace(old, new))


def corpus(change):
    """A corpus in the folder bad, after change(folder)."""

    def make(home):
        write_corpus(home / "bad", documents=20)
        change(home / "bad")

    return make


def halve(folder):
    os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size // 2)


def large_token(folder):
    (folder / "tokens.bin").write_bytes(b"\xff\xff\0\0" + (folder / "tokens.bin").read_bytes()[4:])


def weights(change):
    """A checkpoint in the folder bad, after change(folder)."""

    def make(home):
        shutil.copytree(home / "runs/base/model", home / "bad")
        change(home / "bad")

    return make


def unchanged(folder):
    pass


def integer_weights(folder):
    from safetensors.torch import load_file, save_file

    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    save_file(tensors | {"norm.weight": tensors["norm.weight"].to(torch.uint8)}, path)


def larger_vocabulary(home):
    sizes = json.loads((home / "runs/base/model/config.json").read_text())
    model = GPTOSS(GPTOSSConfig(**{**sizes, "vocab_size": 600}))
    model.save_checkpoint(home / "bad")


def run(change):
    """A copy of runs/base in runs/mine, after change(folder)."""

    def make(home):
        shutil.copytree(home / "runs/base", home / "runs/mine")
        change(home / "runs/mine")

    return make


def encoded_anew(folder):
    path = folder / "states/step-00000010/state.json"
    numbers = json.loads(path.read_text())
    numbers["identity"]["content of data"] += "1"
    path.write_text(json.dumps(numbers | {"checksum": checksum(numbers)}))


def file_for_folder(name):
    def make(home):
        (home / "runs/mine").mkdir(parents=True)
        (home / name).rmdir() if (home / name).exists() else None
        (home / name).write_text("")

    return make


FILE = "model-00001-of-00001.safetensors"
HUGE_HEADER, OPEN_HEADER = b"\xff" * 7 + b"\x7f{}", b"\x08" + bytes(7) + b"{" * 8
HARMONY = edit("meta.json", tokenizer="o200k_harmony")
HF_NAME = replace(INDEX, '"embedding.w', '"model.embed_tokens.w')
TUNE = "--checkpoint=bad --data=corpus --seq_len=32"
MORE = "--num_attention_heads=6 --num_key_value_heads=3"
EVAL = "--eval_every=1"

BAD = {  # case: (arguments, what is prepared, what the message must say)
    # options
    "unknown option": ("tiny.py --flavour=1", None, "no option flavour", "--help"),
    "mistyped option": ("tiny.py --warmup_step=3", None, "warmup_step;", "mean warmup_steps"),
    "another program's word": ("tiny.py --block_size=8", None, "block_size", "called seq_len"),
    "what GPT-OSS has not": ("tiny.py --dropout=0.1", None, "no option dropout", "has none"),
    "option that is gone": ("tiny.py --beta1=0.9", None, "beta1", "fixed at 0.9", "leave it out"),
    "value that is gone": ("tiny.py --optimizer=bf16", None, "optimizer=bf16", "choose split"),
    "word for a number": ("tiny.py --lr=fast", None, "--lr=fast", "expected float"),
    "fraction for a whole": ("tiny.py --steps=1.5", None, "--steps=1.5", "expected int"),
    "power for a whole": ("tiny.py --steps=10^15", None, "--steps=10^15", "expected int"),
    "word for a switch": ("tiny.py --resume=yes", None, "--resume=yes", "true or false"),
    "option without value": ("tiny.py --steps", None, "--steps needs a value", "--steps=..."),
    "one dash": ("tiny.py -lr=1", None, "-lr=1", "write --name=value"),
    "zero": ("tiny.py --batch_size=0", None, "batch_size=0", "positive"),
    "nan": ("tiny.py --lr=nan", None, "lr=nan", "positive"),
    "infinite": ("tiny.py --lr=1e999", None, "lr=inf", "finite"),
    "negative": ("tiny.py --weight_decay=-1", None, "weight_decay=-1", "zero or positive"),
    "huge": (f"tiny.py --steps={10**15}", None, "steps=1000000000000000", "less than 2147483648"),
    "seed": (f"tiny.py --seed={10**20}", None, "seed=1000", "less than 2147483648"),
    "digits": (f"tiny.py --steps={'9' * 5000}", None, "--steps=999", "...", "expected int"),
    "unknown choice": ("tiny.py --recompute=some", None, "recompute='some'", "choose one of"),
    "steps and epochs": ("tiny.py --steps=1 --epochs=1", None, "steps=1", "epochs=1.0"),
    "run elsewhere": ("tiny.py --name=../mine", None, "../mine", "plain name"),
    "run in the folder above": ("tiny.py --name=..", None, "name='..'", "plain name"),
    "long sample": (f"tiny.py --sample={'x' * 64}", None, "sample='xxx", "64 tokens", "at most 63"),
    # config files
    "no such config": ("none.py", None, "none.py does not exist", "configs/"),
    "two configs": ("tiny.py other.py", None, "tiny.py other.py", "one config file"),
    "config is no Python": ("bad.py", config_file("steps = = 3"), "bad.py", "line 1"),
    "config fails": ("bad.py", config_file("steps = 1 / 0"), "bad.py", "division by zero"),
    "config leaves": ("bad.py", config_file("raise SystemExit(0)"), "bad.py", "SystemExit"),
    "config of another type": ("bad.py", config_file("steps = '9'"), "steps='9'", "of type int"),
    "config with a bool": ("bad.py", config_file("steps = True"), "steps=True", "of type int"),
    "config with a list": ("bad.py", config_file("lr = [1] * 99"), "lr=[1, 1", "...", "type float"),
    "config mistyped": ("bad.py", config_file("batch_sise = 9"), "batch_sise", "batch_size"),
    "config of an old version": ("bad.py", config_file("eval_rows = 9"), "eval_rows is gone"),
    "binary config": ("bad.py", overwrite("bad.py", b"\xff\x00\xfe"), "bad.py", "config file"),
    # sizes and ranks
    "rope": ("tiny.py --rope_theta=1", None, "rope_theta=1.0", "greater than 1"),
    "odd head": ("tiny.py --head_dim=7", None, "head_dim=7", "even"),
    "experts": ("tiny.py --experts_per_token=9", None, "experts_per_token=9", "num_experts=4"),
    "heads": ("tiny.py --num_key_value_heads=3", None, "num_key_value_heads=3", "must divide"),
    "no memory for it": ("--num_hidden_layers=999999999", None, "layers=999999999", "smaller"),
    "sp and ranks": ("tiny.py --sp=4", None, "sp=4", "must divide the number of ranks, 2"),
    "sp, replicas, ranks": (
        "tiny.py --sp=2 --replicas=2",
        None,
        "replicas=2",
        "divide",
        "ranks, 2",
    ),
    "sp and length": ("tiny.py --sp=2 --seq_len=31", None, "sp=2", "must divide seq_len=31"),
    "sp and heads": (f"tiny.py --sp=2 {MORE} --num_attention_heads=3", None, "sp=2", "heads=3"),
    "sp and key-value heads": (f"tiny.py --sp=2 {MORE}", None, "sp=2", "a multiple"),
    "batch and ranks": ("tiny.py --batch_size=3", None, "batch_size=3", "multiple of 4"),
    "longer than the model": ("tiny.py --seq_len=128", None, "seq_len=128", "64 positions"),
    "seq_len of one": ("tiny.py --seq_len=1", None, "seq_len=1", "2 or more"),
    "offload of all": ("tiny.py --offload", None, "recompute=none", "recompute=attention or all"),
    "offload without a GPU": ("tiny.py --offload --recompute=all", None, "offload=True", "a GPU"),
    # data
    "nothing to evaluate": (
        f"tiny.py {EVAL} --eval_data=",
        None,
        "eval_every=1",
        "--eval_data=...",
    ),
    "nothing to compare": ("tiny.py --keep_best", None, "keep_best=True", "--eval_every"),
    "held-out tokenizer": (
        *(f"tiny.py --data=bad --eval_data=held-out {EVAL} --vocab_size=201088", corpus(HARMONY)),
        *("eval_data=held-out was encoded by bytes", "encode both with one"),
    ),
    "data of another vocabulary": (TUNE, larger_vocabulary, "of 257", "600", "encode it with"),
    "no data": ("tiny.py --data=none", None, "none", "data.py"),
    "data is text": ("tiny.py --data=bad.py", config_file("Once upon a time"), "bad.py", "data.py"),
    "no held-out data": ("tiny.py --eval_data=none", None, "none", "data.py"),
    "data cut short": ("tiny.py --data=bad", corpus(truncate("tokens.bin", 100)), "bad/tokens.bin"),
    "data of uint16": ("tiny.py --data=bad", corpus(halve), "bad/tokens.bin", "again"),
    "token past the vocabulary": ("tiny.py --data=bad", corpus(large_token), "token 65535", "257"),
    "meta.json": ("tiny.py --data=bad", corpus(overwrite("meta.json", b"{")), "meta.json", "again"),
    "number in meta.json": (
        *(
            "tiny.py --data=bad",
            corpus(replace("meta.json", '"tokens": ', '"tokens": 1e99')),
        ),
        "bad",
    ),
    "no documents": ("tiny.py --data=bad", corpus(edit("meta.json", documents=0, tokens=0)), "bad"),
    "document ends": (
        "tiny.py --data=bad",
        corpus(zeros("documents.bin")),
        "documents.bin",
        "rise",
    ),
    "nothing counted": (
        "tiny.py --data=bad",
        corpus(zeros("counted.bin")),
        "no target to train on",
    ),
    "less data than a batch": ("tiny.py --batch_size=4000", None, "data=corpus", "batch_size=4000"),
    "data for a larger model": ("tiny.py --vocab_size=100", None, "vocab_size=100", "another"),
    # a checkpoint
    "no checkpoint": (TUNE, None, "bad: no such folder", "convert_hf.py", "--checkpoint="),
    "checkpoint of Hugging Face": (
        TUNE,
        weights(HF_NAME),
        "Hugging Face's layout",
        "convert_hf.py",
    ),
    "a run without a model": (
        *("--checkpoint=runs/mine --data=corpus --seq_len=32 --name=x",),
        *(run(lambda f: shutil.rmtree(f / "model")), "runs/mine", "no model/ yet"),
    ),
    "sizes beside it": (f"{TUNE} --hidden_size=64", weights(unchanged), "hidden_size=64", "has 32"),
    "checkpoint cut short": (TUNE, weights(truncate(FILE, 5000)), FILE),
    "its header": (TUNE, weights(overwrite(FILE, HUGE_HEADER)), FILE),
    "its header without end": (TUNE, weights(overwrite(FILE, OPEN_HEADER)), FILE),
    "without a file": (TUNE, weights(lambda f: (f / FILE).unlink()), FILE),
    "without an index": (TUNE, weights(lambda f: (f / INDEX).unlink()), INDEX, "convert_hf.py"),
    "index of nonsense": (TUNE, weights(overwrite(INDEX, b"[" * 100_000)), INDEX),
    "index that leads out": (TUNE, weights(replace(INDEX, FILE, "../" + FILE)), INDEX, "leads out"),
    "tensor missing": (TUNE, weights(replace(INDEX, '"norm.w', '"norm.v')), "norm.weight"),
    "another shape": (TUNE, weights(edit("config.json", hidden_size=48)), "embedding.weight", "48"),
    "weights of whole numbers": (TUNE, weights(integer_weights), "norm.weight", "U8"),
    "a billion layers": (TUNE, weights(edit("config.json", num_hidden_layers=10**9)), "1000000000"),
    "config.json of nonsense": (TUNE, weights(overwrite("config.json", b"GGUF\0")), "config.json"),
    # a run
    "a run is there": ("tiny.py --name=base", None, "runs/base already holds a run", "--resume"),
    "a run that has ended for good": (
        *("tiny.py --name=mine --resume", run(lambda f: shutil.rmtree(f / "states"))),
        *("runs/mine", "kept no state", "--name=..."),
    ),
    "the run's folder is a file": (
        *("tiny.py --name=mine", file_for_folder("runs/mine"), "runs/mine", "another --name"),
    ),
    "states/ is a file": (
        *("tiny.py --name=mine", file_for_folder("runs/mine/states")),
        *("runs/mine/states is not a folder", "remove it"),
    ),
}

AGAIN = "tiny.py --name=base --resume --steps=12"
TOGETHER = {  # what is found once the ranks have met
    "other data": (f"{AGAIN} --data=held-out", None, "data was 'corpus'", "--name"),
    "a corpus encoded anew": (
        *("tiny.py --name=mine --resume --steps=12", run(encoded_anew)),
        *("content of data was", "--name"),
    ),
    "another batch": (f"{AGAIN} --batch_size=8", None, "batch_size was 4 and is 8", "--name"),
    "another optimizer": (f"{AGAIN} --optimizer=split", None, "optimizer was 'fp32'", "--name"),
    "another model": (f"{AGAIN} --hidden_size=64", None, "hidden_size was 32", "--name"),
}
SPOKEN = ["unknown option", "config leaves", "sp and ranks", "no data", "tensor missing"]


def files_in(folder):
    paths = [p for p in folder.rglob("*") if p.is_file() and "output-" not in p.name]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture
def prepared(home, request):
    """(arguments, words of the message) of a case that is prepared; afterwards, that no file was
    made or changed."""
    arguments, prepare, *words = (BAD | TOGETHER)[request.param]
    if prepare:
        prepare(home)
    before = files_in(home)
    yield arguments.split(), words
    after = files_in(home)
    for path in (home / "bad", home / "bad.py", home / "runs/mine"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert after == before


def check_message(text, words):
    assert all(word in text for word in words), text
    assert len(text.splitlines()) == 1 or "does not fit the model" in text, text
    assert len(text) < 1000, text


@pytest.mark.parametrize("prepared", BAD, indirect=True)
def test_bad_input(home, prepared, monkeypatch):
    """Found by a rank alone."""
    arguments, words = prepared
    monkeypatch.chdir(home)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises((ValueError, OSError)) as error:
        check_run(parse(arguments, ""))
    check_message(str(error.value), words)


@pytest.mark.parametrize("prepared", [*SPOKEN, *TOGETHER], indirect=True)
def test_one_of_two_ranks_says_it(home, prepared):
    arguments, words = prepared
    run = Run(home, *arguments, ranks=2)
    codes, text = run.wait(grace=1), run.text()
    assert 0 not in codes and text.count("error: ") == 1 and "Traceback" not in text, text
    assert text.startswith("error: ")
    check_message(text, words)


def test_the_documentation_counts_them():
    number = f"{len(BAD) + len(TOGETHER)} kinds of bad input"
    assert number in " ".join((ROOT / "docs/training.md").read_text().split())


def test_bad_input_in_a_process_of_its_own(home):
    """As a user meets it."""
    command = [sys.executable, ROOT / "train.py", "tiny.py", "--sp=2"]
    done = subprocess.run(
        command, cwd=home, env=NO_GPU, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: sp=2 times replicas=1 must divide the number of ranks, 1: start more with "
        "torchrun --nproc_per_node (dry run: --ranks), or choose a smaller --sp\n"
    )


def test_wandb_is_not_installed(home, monkeypatch):
    if __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match="wandb=True: install it with `pip install wandb`"):
        check_run(parse(["tiny.py", "--wandb", "--name=wandb"], ""))
    assert not Path("runs/wandb").exists()
