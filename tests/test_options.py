"""Options: reading them, help, hints, and what a dry run makes of them."""

import dataclasses
import importlib
import math
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train as loop
from conftest import ROOT
from loop.checks import check_launch
from loop.guards import memory_advice
from loop.options import NONE, REMOVED, SAME, Options, help_text, parse
from loop.plan import peak, settings_of
from model import GPTOSSConfig
from runs import NO_GPU, make_home
from test_train import fresh_model, tiny_options

TRAINING = (ROOT / "docs/training.md").read_text()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("options"))


@pytest.fixture
def mine(tmp_path):
    """write(text) -> the path of a config file with this text."""

    def write(text):
        (tmp_path / "mine.py").write_text(text)
        return str(tmp_path / "mine.py")

    return write


# --------------------------------------------------------------------------------------------------
# Reading


def test_a_config_file_then_the_command_line(mine):
    path = mine("import math\n_helper = 3\nlr = 1\nseq_len = 64 * 2\nsample = 'a=b'\n")
    told = ["--steps=7", path, "--seq_len=96", "--offload=True", "--eval_data=x=y"]
    options = parse(told, "")
    assert (options.name, options.lr, options.seq_len, options.steps) == ("mine", 1, 96, 7)
    assert options.offload is True and options.sample == "a=b" and options.eval_data == "x=y"
    assert parse([], "") == Options(name="run") and parse([path, "--name="], "").name == "mine"


def test_values_after_a_blank_and_switches_alone(mine):
    told = ["--steps", "7", "--resume", "--offload", "false", mine("lr = 1"), "--lr", "1e-3"]
    options = parse([*told, "--sample", "-x y"], "")
    assert (options.steps, options.resume, options.offload) == (7, True, False)
    assert (options.name, options.lr, options.sample) == ("mine", 1e-3, "-x y")
    for missing in ["--steps"], ["--steps", "--resume"]:
        with pytest.raises(ValueError, match="--steps needs a value: --steps=..."):
            parse(missing, "")


@given(st.data())
def test_any_value_of_the_right_type_arrives_and_others_are_named(data):
    field = data.draw(st.sampled_from(dataclasses.fields(Options)))
    words = st.sampled_from(["true", "False"])
    value = st.one_of(st.integers().map(str), st.floats().map(repr), words, st.text())
    text = data.draw(value)
    together = ["--eval_every=1"] if field.name in ("keep_best", "stop_after") else []
    try:
        value = getattr(parse([f"--{field.name}={text}", *together], ""), field.name)
    except ValueError as error:
        assert field.name in str(error) and "\n" not in str(error).replace(text, "")
    else:
        assert type(value) is field.type
        expected = text.lower() == "true" if field.type is bool else field.type(text)
        expected = expected or "run" if field.name == "name" else expected
        assert value == expected and not (field.type is float and math.isnan(value))


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("--offload --recompute=none", "recompute=none"),
        ("--offload --keep_blocks=1", "keep_blocks=1"),
        ("--keep_best", "--eval_every"),
        ("--stop_after=2", "--eval_every"),
        ("--steps=2 --epochs=2", "give one of them"),
    ],
)
def test_options_that_exclude_each_other(wrong, words):
    """Found as they are read: after loading weights on a GPU it would be late."""
    with pytest.raises(ValueError, match=words):
        parse(wrong.split(), "")


def test_steps_or_epochs(mine):
    """The command line's wins over the config file's."""
    assert parse([mine("steps = 7"), "--epochs=2"], "").epochs == 2
    assert parse([mine("epochs = 2"), "--steps=7"], "").epochs == 0
    with pytest.raises(ValueError, match="steps=7 and epochs=2"):
        parse([mine("steps, epochs = 7, 2")], "")


def test_held_out_data_of_other_data(mine, tmp_path, capsys, monkeypatch):
    """A config file's held-out text does not judge a run on data that the command line names."""
    path = mine("data, eval_data, eval_every = 'pydoc', 'pydoc-val', 5")
    monkeypatch.delenv("RANK", raising=False)
    assert parse([path], "").eval_data == parse([path, "--data=pydoc"], "").eval_data == "pydoc-val"
    options = parse([path, f"--data={tmp_path}/a"], "")
    assert (options.eval_data, options.eval_every) == ("", 0)
    assert (
        "held out: nothing. The config file's pydoc-val does not go with" in capsys.readouterr().out
    )
    (tmp_path / "b-val").mkdir()
    (tmp_path / "b-val/meta.json").write_text("{}")
    options = parse([path, f"--data={tmp_path}/b"], "")
    assert (options.eval_data, options.eval_every) == ("", 5)
    assert f"held out: {tmp_path}/b-val instead of the config file's" in capsys.readouterr().out
    options = parse([path, f"--data={tmp_path}/c", "--eval_data=pydoc-val"], "")
    assert (options.eval_data, options.eval_every) == ("pydoc-val", 5)


# --------------------------------------------------------------------------------------------------
# Help and hints


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "usage")
    assert not stop.value.code
    text = capsys.readouterr().out
    sizes = {f.name for f in dataclasses.fields(GPTOSSConfig)}
    for field in dataclasses.fields(Options):
        (rest,) = re.findall(rf" --{field.name}=(.*)$", text, re.MULTILINE)
        meaning = rest.split()[1:]
        assert field.name in sizes or len(meaning) > 1, f"{field.name} has no meaning"
    assert text.index("--name=") < text.index("--lr=") < text.index("--num_hidden_layers=")
    assert max(map(len, text.splitlines())) <= 100


def test_every_option_of_a_config_or_the_readme_exists():
    names = {f.name for f in dataclasses.fields(Options)}
    for path in (ROOT / "configs").glob("*.py"):
        parse([str(path)], "")
    text = (ROOT / "README.md").read_text()
    for command in re.findall(r"train\.py configs/\S+(.*)", text):
        assert set(re.findall(r"--(\w+)", command.split("`")[0])) <= names, command


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ("max_iters", "it is called steps"),
        ("learning_rate", "it is called lr"),
        ("learning_rtae", "did you mean lr"),
        ("block_size", "it is called seq_len"),
        ("n_layer", "it is called num_hidden_layers"),
        ("grad_accum", "how many micro-batches a step has follows from batch_size"),
        ("gradient_accumulation", "how many micro-batches a step has follows from batch_size"),
        ("gradient-checkpointing", "recompute is none, attention or all"),
        ("output_dir", "go to runs/NAME: set name"),
        ("eval_iters", "takes all held-out data"),
        ("num_train_steps", "it is called steps"),
        ("warmup_step", "did you mean warmup_steps"),
        ("batch-size", "did you mean batch_size"),
        ("dropout", "GPT-OSS has none"),
        ("flavour", "see --help"),
    ],
)
def test_hints(wrong, hint):
    with pytest.raises(ValueError, match=f"no option {wrong}.*{hint}"):
        parse([f"--{wrong}=1"], "")


def test_the_words_of_hints_exist():
    names = {f.name for f in dataclasses.fields(Options)}
    assert set(SAME.values()) <= names and not names & {*SAME, *NONE, *REMOVED}
    assert not SAME.keys() & NONE.keys()


@pytest.mark.parametrize("name", [name for name in REMOVED if "=" not in name])
def test_options_of_earlier_versions(name, mine):
    """One line says what became of them, also in an old config file."""
    for told in ([f"--{name}=1"], [mine(f"{name} = 1")]):
        with pytest.raises(ValueError) as error:
            parse(told, "")
        assert str(error.value) == REMOVED[name] and name in REMOVED[name]
    with pytest.raises(ValueError, match="optimizer=bf16 is gone"):
        parse(["--optimizer=bf16"], "")


@pytest.mark.parametrize(
    "told, tasks",
    [
        ({"SLURM_NTASKS": "8"}, 8),
        ({"SLURM_PROCID": "3"}, 4),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, 2),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, 2),
        # a job of eight tasks in which srun starts one
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, 1),
        ({}, 1),
    ],
)
def test_srun_without_torchrun(told, tasks, monkeypatch):
    for name in [name for name in os.environ if name.startswith("SLURM_") or name == "RANK"]:
        monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    if tasks == 1:
        check_launch(Options())
        return
    with pytest.raises(ValueError) as error:
        check_launch(Options())
    assert f"Slurm has {tasks} tasks" in str(error.value) and "\n" not in str(error.value)
    assert "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES" in str(error.value)
    monkeypatch.setenv("RANK", "3")
    check_launch(Options())


# --------------------------------------------------------------------------------------------------
# Dry runs


@pytest.mark.parametrize(
    "config, gigabytes", [("gptoss_64k", 80), ("gptoss_128k_2gpu", 141), ("gptoss_120b", 141)]
)
def test_configs_fit_their_gpus(config, gigabytes, monkeypatch, capsys):
    """With four gigabytes to spare for CUDA and NCCL. Their checkpoints need not be there: a dry
    run says that it plans for the sizes in the config."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    loop.say.cache_clear()
    loop.dry_run(parse([str(ROOT / "configs" / f"{config}.py"), "--dry_run"], ""))
    printed = capsys.readouterr().out
    layers, experts = (36, 128) if config == "gptoss_120b" else (24, 32)
    assert f"does not exist: planned for {layers} layers of {experts} experts" in printed
    assert ("116,829,156,672" if layers == 36 else "20,914,757,184") in printed
    peak = float(re.search(r"([\d.]+) GiB  peak of each", printed)[1]) * 2**30
    assert 0.5 * gigabytes * 1e9 < peak < (gigabytes - 4) * 1e9
    # 65,536 tokens x 25 x 5,760 bytes
    assert ("8.8 GiB  of host memory" in printed) == (config == "gptoss_128k_2gpu")


def test_dry_run(home):
    """In a process of its own, as anyone would start it."""
    told = ["tiny.py", "--dry_run", "--ranks=4", "--sp=2", "--name=dry"]
    command = [sys.executable, ROOT / "train.py", *told]
    text = subprocess.run(
        command, cwd=home, env=NO_GPU, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    parameters = sum(p.numel() for p in fresh_model(tiny_options()).parameters())
    assert f"{parameters:,} parameters, optimizer fp32 at 16 bytes each" in text
    assert "1 micro-batch x 2 groups (sp 2) x 2 sequences x 32 tokens" in text
    assert "GiB  peak of each of 4 GPUs" in text
    assert "FLOPs, if each sequence is one document\n" in text, "nothing is recomputed"
    assert not (home / "runs/dry").exists()


def test_one_rank_prints_a_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        loop.dry_run(Options(batch_size=2))
        assert bool(capsys.readouterr().out) == (rank == "0")


LORA = {"lora_rank": 16, "dry_run": True, "micro_batch": 1}
RUNS_THAT_ARE_FULL = {  # of the 20b, on eight GPUs if nothing else is said
    "every weight": {"recompute": "none"},
    "some blocks kept": {"recompute": "attention", "keep_blocks": 8},
    "nearly all done": {"recompute": "all", "sp": 8, "micro_batch": 1, "optimizer": "split"},
    "adapters on attention": {**LORA, "recompute": "attention", "keep_blocks": 8},
    "on all, one GPU": {**LORA, "lora_targets": "all", "world": 1, "recompute": "none"},
    "packed and shared": {**LORA, "frozen": "mxfp4", "shard_frozen": True, "sp": 2},
    "packed, embedding trained": {**LORA, "frozen": "mxfp4", "lora_targets": "qkv,embedding"},
}
ADVICE = {  # in memory_advice: what it changes
    "a smaller --keep_blocks": {"keep_blocks": 4},
    "--recompute=attention": {"recompute": "attention"},
    "a smaller --micro_batch": {"micro_batch": 1},
    "--frozen=mxfp4": {"frozen": "mxfp4"},
    "--shard_frozen": {"shard_frozen": True},
    "a larger --sp": {"sp": 8},
    "--optimizer=split": {"optimizer": "split"},
    "--offload --keep_blocks=0": {"offload": True, "keep_blocks": 0},
    "--recompute=all": {"recompute": "all"},
}


@pytest.mark.parametrize("told", RUNS_THAT_ARE_FULL.values(), ids=RUNS_THAT_ARE_FULL)
def test_advice_when_memory_runs_out(told, monkeypatch):
    """What would help by the dry run's arithmetic, after what comes before it, and nothing else, in
    the order of docs/training.md."""
    told = {"seq_len": 2**16, "batch_size": 64, "micro_batch": 2} | told
    world = told.pop("world", 8)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    options = Options(**told)
    start, *advice = re.split("(?:^out of memory: try |, then )", memory_advice(options))
    assert start == "" and advice.pop() == "a larger --sp over more GPUs, or a shorter --seq_len"
    advice = [text.split(" (")[0] for text in advice]

    def gib(options):
        config = GPTOSSConfig()
        return peak(config, settings_of(options, config, world)) / 2**30

    needed = gib(options)
    for text, change in ADVICE.items():
        if text == "a larger --sp" and world == 1 or "frozen" in text and not options.lora_rank:
            assert text not in advice
            continue
        try:
            changed = dataclasses.replace(options, **change)
        except ValueError:  # offload, where nothing is recomputed yet
            changed = dataclasses.replace(options, **change, recompute="attention")
        saves = needed - gib(changed)
        assert (text in advice) == (saves > 0.1), (text, saves)
    order = re.search(r"When it does not fit, (.*?) A run", TRAINING, re.DOTALL)[1]
    order = re.findall(r"`([\w=]+)`", order)
    places = [order.index(re.search(r"--([\w=]+)", text)[1]) for text in advice]
    assert places == sorted(places) and len(order) == len(ADVICE) + 1


def test_dry_run_counts_every_option_of_memory(monkeypatch, capsys):
    """Each of these changes what the dry run prints."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    changes = [{}, {"keep_blocks": 2}, {"recompute": "none"}, {"offload": True}, {"sp": 2}]
    changes += [{"optimizer": "split"}, {"micro_batch": 2}]
    printed = []
    for change in changes:
        settings = {"ranks": 4, "seq_len": 2**17, "recompute": "attention", **change}
        loop.dry_run(Options(**settings))
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 7
    assert sum(" more for what is recomputed" in text for text in printed) == 6


def test_help_is_not_longer_than_two_screens():
    assert len(help_text("usage").splitlines()) < 70


def test_nothing_is_said_of_an_import_that_was_made_before(monkeypatch):
    """PyTorch is here already, as for every program that imports train.py after it."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    importing = importlib.reload(importlib.import_module("loop.importing"))
    assert not importing._timer.is_alive()
