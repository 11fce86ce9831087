"""The README: each of its commands runs on a small stand-in, and what it says of files is true.

A new command needs an entry in STAND_INS: what to add to it so that it runs here in seconds, on a
CPU, with a tiny model in the place of the 20b. Commands of the other documents are only parsed."""

import contextlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

import bench.__main__ as bench
import convert_hf
import data
import runs
import sample
import sp
from bench import plots
from examples.transformers_ulysses import parallelize
from loop.options import parse
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
    "pip install openai-harmony torch==2.11.0": None,
    "python convert_hf.py openai/gpt-oss-20b": "",  # a folder of that name stands for the Hub's
    "python data.py corpus.jsonl --out data/corpus": "--tokenizer=bytes",
    "python train.py configs/gptoss_64k.py --dry_run --gpu_gib=79.2": "",
    "python -m bench --curves": None,
    "torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py --steps=400": SMALL_RUN,
    'python sample.py runs/gptoss_64k "Why is the sky blue?"': "--max_tokens=3",
    "python convert_hf.py --export runs/gptoss_64k --out my-model": "",
    'python -m bench --inspect runs/gptoss_64k "Why is the sky blue?"': "",
    "python convert_hf.py openai/gpt-oss-20b --packed": "",
    "python data.py chats.jsonl --out data/chats": "--tokenizer=bytes",
    "python train.py configs/gptoss_lora.py --data=data/chats --epochs=2": "--seq_len=1024",
    "python sample.py runs/gptoss_lora": "Hi --max_tokens=3",  # with a prompt it ends by itself
    "python convert_hf.py --export runs/gptoss_lora --out my-adapters --adapter": "",
    "python -m bench --against=transformers": "--rows=16 --layers=1",
    "python -m bench --rehearse=8": "--rows=16x16",
    "python -m bench --adapters=whole": "--rows=16",
    "python -m bench --generate --against=transformers": "--rows=1x16",
    # tests/test_examples.py runs it
    "torchrun --nproc_per_node 2 -m examples.grpo --lora_rank=8 --lora_layers=1-3 "
    "--lora_targets=attention,experts": None,
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


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where a reader of the README is, with a tiny model in the folder `tiny`, and a corpus."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    GPTOSS(TINY).save_checkpoint("tiny")
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    texts = [{"text": f"{number} is a number. " * 9} for number in range(60)]
    Path("corpus.jsonl").write_text("\n".join(map(json.dumps, [*texts, chat])))
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, [chat] * 60)))
    shutil.copytree(ROOT / "configs", "configs")
    return tmp_path


def run(home, command, monkeypatch, capsys):
    """Run a command of the README as STAND_INS says. Returns what it printed."""
    added = STAND_INS[command]
    program, *words = shlex.split(command)
    if program == "pip":
        assert words[1] in (ROOT / "tests/requirements.txt").read_text().split()
    if added is None:
        return
    words += shlex.split(added)
    if (
        program == "torchrun"
        or words[0] == "train.py"
        and {"--dry_run", "--help"}.isdisjoint(words)
    ):
        ranks = 2 if program == "torchrun" else 1
        return runs.train(home, *words[words.index("train.py") + 1 :], ranks=ranks)
    if words[0] == "-m":
        importlib.import_module(f"{words[1]}.__main__").main(words[2:])
    else:
        monkeypatch.setattr(sys, "argv", words)
        with contextlib.suppress(SystemExit) if "--help" in words else contextlib.nullcontext():
            importlib.import_module(words[0].removesuffix(".py")).main()
    return capsys.readouterr().out


def test_commands_run(home, monkeypatch, capsys):
    """All of them, in the README's order, and they do what it says."""
    convert_hf.main(["--export", "tiny", "--out", "openai/gpt-oss-20b", "--mxfp4"])
    said = {}
    for command in commands("README.md"):
        print(command)
        said[command] = run(home, command, monkeypatch, capsys)
    assert Path("checkpoints/gpt-oss-20b/config.json").exists()
    assert Path("data/corpus/meta.json").exists()
    assert [row["step"] for row in runs.metrics(home, "gptoss_64k")] == [0, 1]
    assert Path("my-adapters/adapter_config.json").exists()
    assert "model_type" in json.loads(Path("my-model/config.json").read_text())
    (dry_run,) = (text for command, text in said.items() if "--dry_run" in command)
    assert "peak of each of 8 GPUs" in dry_run
    (table,) = (said[x] for x in said if x == "python -m bench --against=transformers")
    assert re.search(r"^transformers +16 ", table, re.MULTILINE)


def test_each_command_has_a_stand_in():
    """And no stand-in is left over."""
    assert set(STAND_INS) == set(commands("README.md"))


def test_code_runs(home):
    """Its Python, in order."""
    shutil.copytree("tiny", "checkpoints/gpt-oss-20b")
    transformers = pytest.importorskip("transformers", reason="the README wraps its model")
    convert_hf.main(["--export", "tiny", "--out", "my-model"])
    theirs = transformers.GptOssForCausalLM.from_pretrained("my-model")
    text = torch.randint(TINY.vocab_size, (2, 17))
    names = {"sp": sp, "attention": dense_attention, "parallelize": parallelize, "theirs": theirs}
    names |= {"tokens": text[:, :-1], "targets": text[:, 1:].contiguous()}
    names |= {"count": torch.tensor(names["targets"].numel())}
    expected = GPTOSS.from_checkpoint("tiny")(names["tokens"], names["targets"])
    code = [block.text for block in read("README.md")[0] if block.language == "python"]
    assert code
    for text in code:
        for there, here in CODE.items():
            text = text.replace(there, here)
        exec(compile(text, "README.md", "exec"), names)
        if "parallelize" in text:
            torch.testing.assert_close(names["loss"], expected, atol=1e-5, rtol=0)
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
    for path in links:
        assert ((ROOT / document).parent / path).exists(), path
    for path in spans:
        assert any((ROOT / room / path).exists() for room in ("", "tests", "configs")), path


def test_files_have_the_lines_it_says():
    rows = re.findall(r"^\| `(.+)` \| (\d+) \|", read("README.md")[1], re.MULTILINE)
    assert [name for name, _ in rows[:4]] == ["model.py", "sp.py", "train.py", "convert_hf.py"]
    for name, said in rows:
        lines = len((ROOT / name).read_text().splitlines())
        assert lines == pytest.approx(int(said), rel=0.15), f"{name} has {lines} lines"


def test_figures_are_from_the_benchmarks():
    """Each measured figure of the README is in docs/benchmarks.md, which names its command; and the
    speeds of the tables there are those of docs/results, which the README's are too."""
    figures = r"(?<![\w.])\d[\d,]*\.\d+(?![\w.])|(?<![\w.])\d{1,2},\d{3}(?!\d)|\de-\d+"
    benchmarks = (ROOT / "docs/benchmarks.md").read_text()
    text = read("README.md")[1]
    versions = {"2.11", "2.13", "3.10", "5.17"}
    found = set(re.findall(figures, re.sub(r"https?://\S+", "", text))) - versions
    assert len(found) > 30
    assert not {figure for figure in found if figure not in benchmarks}
    for name in "bench", "train", "train-4", "train-4-h100", "rehearse-8", "documents":
        for row in json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]:
            if "error" not in row and row.get("documents") != "none":
                speed = f"{row['tokens_per_second']:,.0f}"
                assert f"| {speed} |" in benchmarks, row
                assert speed in text or name in ("train", "documents"), row
    for name in "generate", "generate-h200":
        for row in json.loads((ROOT / f"docs/results/{name}.json").read_text())["rows"]:
            rate = f"{row['rate']:,.0f}" if row["rate"] > 100 else f"{row['rate']:.1f}"
            assert f" {row['ms']:.2f} ms |" in benchmarks and f" {rate} |" in benchmarks, row


def test_the_figure_shows_the_results(tmp_path, monkeypatch):
    """It is drawn from docs/results, with each speed as a number and what they say as its title."""
    Figure = pytest.importorskip("matplotlib.figure", reason="draws the figure").Figure
    results = ROOT / "docs/results"
    texts = [(results / f"{name}.json").read_text() for name in ("bench", "train")]
    assert plots.digest(texts).encode() in (ROOT / "docs/bench.png").read_bytes()

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (drawn.append(f), save(f, *a, **k)))
    plots.plot(results / "bench.json", tmp_path / "bench.png")
    assert plots.digest(texts).encode() in (tmp_path / "bench.png").read_bytes()
    speed, training = drawn[0].axes
    assert speed.get_title(loc="left").strip() == "2.3 to 2.7 times as fast as transformers"
    assert training.get_title(loc="left").strip().endswith("up to 512K tokens")
    for axes, text in zip((speed, training), texts):
        written = [item.get_text() for item in axes.texts]
        for row in json.loads(text)["rows"]:
            if "error" not in row:
                assert f"{row['tokens_per_second']:,}" in written
    colours = {item.get_color() for item in (*speed.lines, *training.lines)}
    assert colours == {plots.OURS, plots.THEIRS}


# --------------------------------------------------------------------------------------------------
# Commands of the other documents


class Parsed(Exception):
    """A command was read to its end."""


def parsed(*arguments, **settings):
    raise Parsed


@pytest.mark.parametrize("document", DOCUMENTS[1:])
def test_commands_parse(document, monkeypatch):
    for module, names in (
        (bench, ["measure"]),
        (bench.plots, ["plot"]),
        (bench.curves, ["main"]),
        (bench.inspection, ["show"]),
        # the first of what a conversion does
        (convert_hf, ["import_checkpoint", "export_checkpoint", "verify", "find_model"]),
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
        if words[0] == "-m" and words[1].startswith("examples."):
            assert importlib.util.find_spec(words[1]), command
            continue
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
