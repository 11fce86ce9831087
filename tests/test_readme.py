"""The README: each of its commands runs on a small stand-in, and what it says of files is true.

A new command needs an entry in STAND_INS: what to add to it so that it runs here in seconds, on a
CPU, with a tiny model in the place of the 20b. Commands of the other documents are only parsed."""

import contextlib
import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import runs
import torch

import sp
from model import GPTOSS, GPTOSSConfig, dense_attention

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = "README.md", "docs/training.md", "docs/benchmarks.md"
TINY = GPTOSSConfig(
    num_hidden_layers=2, num_experts=4, experts_per_token=2, vocab_size=257, hidden_size=32,
    intermediate_size=32, head_dim=8, num_attention_heads=4, num_key_value_heads=2,
    sliding_window=8,
)  # fmt: skip
SMALL_RUN = "--seq_len=64 --sp=2 --batch_size=2 --recompute=none --steps=2"
STAND_INS = {  # a command of the README: what is added to it here; None: it does not run here
    "pip install openai-harmony": None,
    "python convert_hf.py openai/gpt-oss-20b": "",  # a folder of that name stands for the Hub's
    "python data.py corpus.jsonl --out data/corpus": "--tokenizer=bytes",
    "python train.py configs/gptoss_64k.py --dry_run=true": "",
    "torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py --steps=400": SMALL_RUN,
    'python sample.py runs/gptoss_64k "Why is the sky blue?"': "--max_tokens=3",
    "python convert_hf.py --export runs/gptoss_64k --out my-model": "",
    "python -m bench --against=transformers": "--rows=16 --layers=1",
    "python train.py --help": "",
    "pytest --slow": None,
}
CODE = {  # in its Python: smaller sizes, and the CPU
    '"cuda"': '"cpu"', "4097": "65", "4096": "64", "1024": "16", "512": "8", "=32)": "=2)",
}  # fmt: skip
Block = namedtuple("Block", "language text")


def read(document):
    """(blocks of code, the text between them) of a document."""
    blocks, outside, language = [], [], None
    for line in (ROOT / document).read_text().splitlines():
        if language is None and line.startswith("```"):
            language, lines = line[3:], []
        elif line == "```":
            blocks.append(Block(language, "\n".join(lines)))
            language = None
        else:
            (outside if language is None else lines).append(line)
    assert language is None, f"{document}: a block has no end"
    return blocks, "\n".join(outside)


def commands(document):
    """The commands of a document: those of its bash blocks, then those in its text."""
    blocks, text = read(document)
    scripts = [block.text for block in blocks if block.language == "bash"]
    if document == "README.md":
        scripts = scripts[1:]  # CI types the first one
    for script in scripts:
        for line in script.replace("\\\n", "").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words).replace("'", '"')
    for span in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(pip|python|pytest|torchrun) \S", span) and "..." not in span:
            yield shlex.join(shlex.split(span)).replace("'", '"')


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where a reader of the README is, with a tiny released model and a corpus."""
    home = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", home / "configs")
    torch.manual_seed(0)
    GPTOSS(TINY).save_checkpoint(home / "tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module("convert_hf").main(
            ["--export", str(home / "tiny"), "--out", str(home / "openai/gpt-oss-20b")]
        )
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    texts = [{"text": f"{number} is a number. " * 9} for number in range(60)]
    lines = map(json.dumps, [*texts, chat])
    (home / "corpus.jsonl").write_text("\n".join(lines))
    return home


def run(home, command, monkeypatch, capsys):
    """Run a command of the README as STAND_INS says. Returns what it printed."""
    added = STAND_INS[command]
    program, *words = shlex.split(command)
    if program == "pip":
        assert words[1] in (ROOT / "tests/requirements.txt").read_text().split()
    if added is None:
        return
    words += shlex.split(added)
    monkeypatch.chdir(home)
    if program == "torchrun":
        return runs.train(home, *words[words.index("train.py") + 1 :], ranks=2)
    if words[0] == "-m":
        importlib.import_module(f"{words[1]}.__main__").main(words[2:])
    else:
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            importlib.import_module(words[0].removesuffix(".py")).main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def said(home):
    """What each command printed, in the README's order."""
    return {}


@pytest.mark.parametrize("command", dict.fromkeys(commands("README.md")))
def test_commands_run(home, said, command, monkeypatch, capsys):
    assert command in STAND_INS, f"`{command}` needs a stand-in in tests/test_readme.py"
    said[command] = run(home, command, monkeypatch, capsys)


def test_commands_did_what_the_readme_says(home, said):
    assert (home / "checkpoints/gpt-oss-20b/config.json").exists()
    assert (home / "data/corpus/meta.json").exists()
    steps = [row["step"] for row in runs.metrics(home, "gptoss_64k")]
    assert steps == [0, 1]
    assert "model_type" in json.loads((home / "my-model/config.json").read_text())
    (dry_run,) = (text for command, text in said.items() if "--dry_run" in command)
    assert "peak of each of 8 GPUs" in dry_run
    (table,) = (text for command, text in said.items() if "--against" in command)
    assert re.search(r"^transformers +16 ", table, re.MULTILINE)


def test_no_stand_in_is_left_over():
    assert set(STAND_INS) == set(commands("README.md"))


def test_code_runs(home, monkeypatch):
    """Its Python, in order, on the converted stand-in."""
    monkeypatch.chdir(home)
    names = {"sp": sp, "attention": dense_attention}
    code = [block.text for block in read("README.md")[0] if block.language == "python"]
    assert code
    for text in code:
        for there, here in CODE.items():
            text = text.replace(there, here)
        exec(compile(text, "README.md", "exec"), names)
    assert names["attention"] is not dense_attention
    assert names["logits"].shape == (1, 8, 257) and names["loss"].isfinite()
    assert names["logp"].shape == names["entropy"].shape == (2, 64)
    assert names["routes"].shape == (2, 2, 64, 2) and len(names["answers"]) == 2


def test_ci_types_the_first_block():
    """Word for word; and each line of commands is readable without scrolling sideways."""
    line = next(x for x in (ROOT / ".ci/run").read_text().splitlines() if x.startswith("sed"))
    extract = line.partition(" >")[0]
    typed = subprocess.run(["bash", "-c", extract], cwd=ROOT, capture_output=True, text=True)
    blocks = [block for block in read("README.md")[0] if block.language == "bash"]
    assert typed.stdout.rstrip("\n") == blocks[0].text
    assert max(map(len, blocks[0].text.splitlines())) <= 90
    assert max(len(line) for block in blocks for line in block.text.splitlines()) <= 100


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_have_a_language(document):
    """Else a command could stand in one that no test looks at."""
    assert {block.language for block in read(document)[0]} <= {"bash", "python", "text"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_and_links_exist(document):
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    spans = re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md|txt)|(?:loop|bench|docs|tests)/)`", text)
    made = {"input.txt"}
    for path in links:
        assert ((ROOT / document).parent / path).exists(), path
    for path in set(spans) - made:
        assert (ROOT / path).exists() or (ROOT / "tests" / path).exists(), path


def test_files_have_the_lines_it_says():
    rows = re.findall(r"^\| (`.+`) \| ([\d, ]+) \|", read("README.md")[1], re.MULTILINE)
    assert len(rows) > 4
    for names, numbers in rows:
        for name, said in zip(re.findall(r"`([^`]+)`", names), numbers.split(","), strict=True):
            lines = len((ROOT / name).read_text().splitlines())
            assert lines == pytest.approx(int(said), rel=0.1), f"{name} has {lines} lines"


def test_figures_are_from_the_benchmarks():
    """Each measured figure of the README is in docs/benchmarks.md, which names its command; and the
    speeds of the tables, there and in the README, are those of docs/results."""
    figures = r"(?<![\w.])\d[\d,]*\.\d+(?![\w.])|(?<![\w.])\d{1,2},\d{3}(?!\d)|\de-\d+"
    benchmarks = (ROOT / "docs/benchmarks.md").read_text()
    text = read("README.md")[1]
    versions = {"2.11", "2.13", "3.10", "5.17"}
    found = set(re.findall(figures, re.sub(r"https?://\S+", "", text))) - versions
    assert len(found) > 30
    assert not {figure for figure in found if figure not in benchmarks}
    for name in "bench", "train":
        for row in json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]:
            if "error" not in row:
                speed = f"{row['tokens_per_second']:,}"
                assert f"| {speed} |" in benchmarks, row
                assert speed in text or row["row"] == "1 x 32K", row


# --------------------------------------------------------------------------------------------------
# Commands of the other documents


class Parsed(Exception):
    """A command was read to its end."""


def parsed(*arguments, **settings):
    raise Parsed


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_commands_parse(document, monkeypatch):
    import bench.__main__ as bench
    import convert_hf
    import data
    import sample
    from loop.options import parse

    for module, names in (
        (bench, ["measure"]),
        (bench.plots, ["plot"]),
        (bench.curves, ["main"]),
        (convert_hf, ["import_checkpoint", "export_checkpoint", "verify"]),
        (data, ["run"]),
        (sample, ["write"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, parsed)
    monkeypatch.chdir(ROOT)
    for command in commands(document):
        program, *words = shlex.split(command)
        if program == "pip":
            continue
        if program == "pytest" or words[:2] == ["-m", "pytest"]:
            files = [word for word in words if word.startswith("tests/")]
            assert files and all((ROOT / word).exists() for word in files), command
            continue
        if program == "torchrun":
            words = words[words.index("-m" if "-m" in words else "train.py") :]
        if words[0] == "-m":
            assert words[1] == "bench", command
            with pytest.raises(Parsed):
                bench.main(words[2:])
            continue
        script, *arguments = words
        assert (ROOT / script).exists(), command
        if script == "train.py":
            if "--help" not in arguments:
                parse(arguments, "")
        elif script in ("data.py", "convert_hf.py", "sample.py"):
            monkeypatch.setattr(sys, "argv", words)
            with pytest.raises(Parsed):
                importlib.import_module(script.removesuffix(".py")).main()
