"""A run of train.py from its first file to its last: states, resuming, the best weights."""

import dataclasses
import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import train as loop
from loop import states as loop_states
from loop.states import Progress, States, check_same_run, examine, saved_states
from model import GPTOSS
from runs import Run, copy_run, held_out, logged, losses, make_home, metrics, states, train
from snapshots import load_state
from test_train import (
    assert_same_losses,
    assert_same_weights,
    tiny_options,
    whole_batch,
)
from weights import weight_files


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("resume"))


STEPS = ("tiny.py", "--steps=12", "--save_every=4", "--keep=9")
EVALUATE = "--eval_every=6"


@pytest.fixture(scope="module")
def printed(home):
    """{name of a run of 12 steps that kept its states after 4, 8 and 12: what it printed}"""
    return {
        "one": train(home, *STEPS, EVALUATE, "--name=one", "--sample=ab"),
        "two": train(home, *STEPS, "--name=two", ranks=2),
    }


def files_of(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


# --------------------------------------------------------------------------------------------------
# Resuming


def test_resumed_on_one_device_to_the_last_digit(home, printed):
    copy_run(home, "one", "again", 8)
    with open(home / "runs/again/metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')  # what a full disk leaves of a line
    text = train(home, *STEPS, EVALUATE, "--name=again", "--resume")
    assert "goes on after step 7\n" in text and "step  7 |" not in text and "step  8 |" in text
    assert losses(home, "again") == losses(home, "one")
    assert held_out(home, "again") == held_out(home, "one")
    assert_same_weights(home, "again", "one")


@pytest.mark.parametrize(
    "name, ranks, options",
    [
        ("one", 2, ["--sp=2"]),
        ("two", 1, []),
        ("two", 4, ["--sp=2"]),
        ("two", 4, ["--replicas=2", "--micro_batch=1"]),
    ],
)
def test_resumed_on_another_number_of_ranks(home, printed, name, ranks, options):
    copy = f"{name}-on-{ranks}-{len(''.join(options))}"
    copy_run(home, name, copy, 8)
    text = train(home, *STEPS, f"--name={copy}", "--resume", *options, ranks=ranks)
    assert "goes on after step 7\n" in text
    assert_same_losses(home, copy, name)


def many_files(rank):
    loop_states.FILE_BYTES = 1000


@pytest.mark.parametrize("ranks", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_state_in_many_files(home, printed, ranks):
    """As a large one has. A run without that limit resumes it."""
    if not (home / "runs/files").exists():
        train(home, *STEPS, "--name=files", ranks=2, prepare=many_files)
    files = sorted(path.name for path in (home / "runs/files/states/step-00000008").iterdir())
    assert len(files) > 20 and files[:-1] == sorted(f for f in files if f.startswith("shard-0000"))
    assert losses(home, "files") == losses(home, "two")
    ours = load_state(home / "runs/files/states/step-00000012")
    model = GPTOSS.from_checkpoint(home / "runs/two/model")
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), model.parameters()))
    copy_run(home, "files", f"files-on-{ranks}", 8)
    options = (f"--name=files-on-{ranks}", "--resume", "--keep=1", "--micro_batch=1")
    text = train(home, "tiny.py", "--steps=12", "--save_every=4", *options, ranks=ranks)
    assert "goes on after step 7\n" in text and "damaged" not in text
    assert_same_losses(home, f"files-on-{ranks}", "two")
    assert states(home, f"files-on-{ranks}") == ["step-00000012"]


def test_resumed_with_the_split_optimizer(home):
    """The low halves of the master weights and the bf16 moments come back too."""
    options = ("tiny.py", "--optimizer=split", "--steps=12", "--save_every=6")
    train(home, *options, "--name=split")
    copy_run(home, "split", "split-again", 6)
    train(home, *options, "--name=split-again", "--resume")
    assert losses(home, "split-again") == losses(home, "split")
    assert_same_weights(home, "split-again", "split")


def of_an_earlier_version(state):
    """What state.json had before it had checksums, marks and the corpus's content."""
    numbers = json.loads((state / "state.json").read_text())
    old = {key: numbers[key] for key in ("step", "updates", "identity", "files")}
    del old["identity"]["content of data"]
    old["identity"]["long_documents"] = "cut"
    (state / "state.json").write_text(json.dumps(old))


def test_a_state_of_an_earlier_version_is_resumed(home, printed):
    run = copy_run(home, "one", "old", 8)
    for state in (run / "states").iterdir():
        of_an_earlier_version(state)
    assert "goes on after step 7\n" in train(home, *STEPS, EVALUATE, "--name=old", "--resume")
    assert losses(home, "old") == losses(home, "one")
    assert_same_weights(home, "old", "one")


def test_resumed_after_the_end_only_writes_the_weights(home, printed):
    copy_run(home, "one", "done", 12)
    text = train(home, *STEPS, EVALUATE, "--name=done", "--resume")
    assert "step 11 |" not in text and losses(home, "done") == losses(home, "one")
    assert_same_weights(home, "done", "one")


@pytest.mark.parametrize("steps", [8, 12])
def test_resuming_a_finished_run_changes_nothing(home, printed, steps):
    before = files_of(home / "runs/two")
    text = train(home, "tiny.py", f"--steps={steps}", "--name=two", "--resume", ranks=2)
    assert text == "runs/two has ended after step 11: nothing is left to do\n"
    assert files_of(home / "runs/two") == before


def test_which_states_continue_which_run():
    was = {"hidden_size": 8, "data": "here", "tokens in data": 5, "content of data": "abc"}
    check_same_run("runs/x", was, was | {"data": "moved"})
    check_same_run("runs/x", {"hidden_size": 8, "long_documents": "cut"}, was)
    for other in {"hidden_size": 9}, {"content of data": "xyz"}, {"tokens in data": 6}:
        with pytest.raises(ValueError, match=f"{next(iter(other))} was .* --name"):
            check_same_run("runs/x", was, was | other)
    with pytest.raises(ValueError, match="data was 'here' and is 'moved'"):
        check_same_run("runs/x", {"data": "here"}, was | {"data": "moved"})
    with pytest.raises(ValueError, match="dropped long documents"):
        check_same_run("runs/x", was | {"long_documents": "drop"}, was)


# --------------------------------------------------------------------------------------------------
# Which states stay


def test_names_that_are_no_states(tmp_path):
    names = ("step-00000004", "step-100000000", "step-99999999", "step-0000004", "step-best")
    for name in (*names, "step-00000004.backup", ".step-00000008.partial-1"):
        (tmp_path / name).mkdir()
    assert list(saved_states(tmp_path)) == [100000000, 99999999, 4]
    assert saved_states(tmp_path / "none") == {}


def test_what_is_not_a_state_stays(home):
    options = ("tiny.py", "--save_every=2", "--keep=1", "--name=mine", "--resume")
    train(home, *options, "--steps=4")
    shutil.copytree(home / "runs/mine/states/step-00000004", home / "runs/mine/states/step-4.bak")
    (home / "runs/mine/states/step-best").write_text("a note")
    train(home, *options, "--steps=8")
    assert states(home, "mine") == ["step-00000008", "step-4.bak", "step-best"]


def test_damaged_states_do_not_count(home):
    """The last undamaged state is not removed in favour of a damaged one."""
    train(home, "tiny.py", "--steps=6", "--save_every=3", "--keep=3", "--name=kept")
    damaged = home / "runs/kept/states/step-00000006"
    os.truncate(next(damaged.glob("*.safetensors")), 1000)
    options = ("tiny.py", "--keep=1", "--name=kept", "--resume")
    run = Run(home, *options, "--steps=100000").wait_for_step(3)
    run.kill(15)
    run.ends_well()
    last = len(losses(home, "kept"))
    good = [
        s for s, folder in saved_states(home / "runs/kept/states").items() if examine(folder)[0]
    ]
    assert good == [last]
    train(home, *options, f"--steps={last + 2}")


def no_finite_loss_from_step_4(rank):
    """And the last state takes longer to write than the steps that follow."""
    good, calls, publish = GPTOSS.forward, [], States._publish

    def forward(self, *args, **kwargs):
        calls.append(1)
        return good(self, *args, **kwargs) * (1 if len(calls) <= 4 * 2 else float("nan"))

    def publish_late(self, written, work, numbers):
        time.sleep(2 * (numbers["step"] == 8))
        return publish(self, written, work, numbers)

    GPTOSS.forward, States._publish = forward, publish_late


def test_states_saved_while_updates_are_skipped_do_not_count(home):
    options = ("tiny.py", "--save_every=1", "--keep=2", "--steps=50", "--name=lost")
    run = Run(home, *options, prepare=no_finite_loss_from_step_4)
    assert run.wait() == [1] and "5 updates in a row were not finite" in run.text()
    found = {
        step: examine(folder) for step, folder in saved_states(home / "runs/lost/states").items()
    }
    skipped = {step: numbers["skipped"] for step, (numbers, damage) in found.items() if not damage}
    assert {3: 0, 4: 0}.items() <= skipped.items() and skipped[8] == 4


# --------------------------------------------------------------------------------------------------
# The best


def scripted_evaluations(rank):
    """Held-out losses of the evaluations of a run, whatever the model."""
    script = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 0.5, 12: 0.6}
    judge, evaluated = Progress.judge, States.evaluated
    Progress.judge = lambda self, loss: judge(self, script[self.step])
    States.evaluated = lambda self, at, loss, better: evaluated(self, at, script[at.step], better)


BEST = ("tiny.py", "--eval_every=2", "--save_every=2", "--keep=1", "--keep_best", "--steps=8")


def test_the_best_state_stays_and_becomes_the_model(home):
    train(home, "tiny.py", "--steps=8", "--save_every=4", "--name=plain", "--keep=9")
    text = train(home, *BEST, "--name=best", prepare=scripted_evaluations)
    assert states(home, "best") == ["step-00000004", "step-00000008"]
    marks = [examine(state)[0] for state in (home / "runs/best/states").iterdir()]
    assert {numbers["step"]: numbers["held_out"] for numbers in marks} == {4: 1.0, 8: 4.0}
    assert "weights are in runs/best/model: the best ones, of step 3, held out 1.0000\n" in text
    assert "the last weights" not in text
    copy_run(home, "plain", "plain-4", 4)
    train(home, "tiny.py", "--steps=4", "--resume", "--name=plain-4")
    assert_same_weights(home, "best", "plain-4")


def test_a_resumed_run_knows_the_best(home):
    """Also one that stopped between two evaluations, and one that takes longer to be better."""
    name = "best-again"
    train(home, *BEST, f"--name={name}", prepare=scripted_evaluations)
    shutil.rmtree(home / "runs" / name / "model")
    options = (*BEST[:-1], "--steps=12", f"--name={name}", "--resume")
    text = train(home, *options, prepare=scripted_evaluations)
    assert states(home, name) == ["step-00000010", "step-00000012"]
    assert "best so far" in text and "the best ones, of step 9, held out 0.5000" in text


def test_without_save_every_only_the_best_is_saved(home):
    options = [option for option in BEST if "save_every" not in option]
    train(home, *options, "--name=only-best", prepare=scripted_evaluations)
    assert states(home, "only-best") == ["step-00000004"]


def test_stop_after(home):
    """Two evaluations without a better one end the run: its model and its state are there."""
    options = ("tiny.py", "--eval_every=2", "--save_every=50", "--steps=12", "--name=patience")
    text = train(home, *options, "--stop_after=2", prepare=scripted_evaluations)
    assert len(losses(home, "patience")) == 8 and states(home, "patience") == ["step-00000008"]
    assert "ended after step 7: 2 evaluations without a better one" in text
    said = "model/ holds the last weights; --keep_best keeps the best, held out 1.0000\n"
    assert f"{said}weights are in" in text
    assert (home / "runs/patience/model").exists()
    again = (*options, "--resume", "--stop_after=2")
    assert "nothing is left to do" in train(home, *again, prepare=scripted_evaluations)
    longer = (*options, "--resume", "--stop_after=3")
    train(home, *longer, prepare=scripted_evaluations)
    assert len(losses(home, "patience")) == 12


# --------------------------------------------------------------------------------------------------
# Epochs, and how often the data was seen


def test_epochs(home):
    text = train(home, "tiny.py", "--data=held-out", "--epochs=1.5", "--name=epochs")
    rows = metrics(home, "epochs")
    sequences = rows[0]["epoch"] ** -1 * 4
    assert len(rows) == -(-1.5 * sequences // 4) and 1.5 <= rows[-1]["epoch"] < 1.5 + 4 / sequences
    assert f"{len(rows)} steps of 4 sequences: " in text and "warning" not in text
    many = train(home, "tiny.py", "--data=held-out", "--epochs=6", "--name=many")
    assert "warning: 6 epochs over the same data; --epochs=5 would be" in many


# --------------------------------------------------------------------------------------------------
# Files and output


def test_files_of_a_run(home, printed):
    run = home / "runs/one"
    settings = json.loads((run / "config.json").read_text())
    assert settings.pop("tokenizer") == "bytes"
    changes = {"steps": 12, "save_every": 4, "keep": 9, "eval_every": 6, "sample": "ab"}
    assert settings == dataclasses.asdict(tiny_options(name="one", **changes))
    names = {"config.json", "metrics.jsonl", "states", "model"}
    assert {path.name for path in run.iterdir()} - {"loss.png"} == names
    assert states(home, "one") == [f"step-{n:08d}" for n in (4, 8, 12)]
    assert "weights are in runs/one/model\nab" in printed["one"]
    pytest.importorskip("matplotlib", reason="draws loss.png")
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_fine_tuning(home, printed):
    """From a run: config.json says which model runs, and what convert_hf.py put beside the weights
    lies beside the trained ones, and nothing else does."""
    shutil.copytree(home / "runs/one/model", home / "converted")
    companions = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    companions |= {"chat_template.jinja", "generation_config.json", "hf_config.json"}
    for name in (*companions, "README.md"):
        (home / "converted" / name).write_text(name)
    options = ("--data=corpus", "--seq_len=32", "--steps=1")
    train(home, *options, "--checkpoint=converted", "--name=tuned", ranks=2)
    tuned = home / "runs/tuned/model"
    weights = {path.name for path in weight_files(tuned).values()}
    weights |= {"model.safetensors.index.json", "config.json"}
    assert {path.name for path in tuned.iterdir()} == weights | companions
    assert all((tuned / name).read_text() == name for name in companions)
    model = GPTOSS.from_checkpoint(home / "converted")
    expected = model(*whole_batch(home, tiny_options(), "corpus", range(8))).item()
    assert metrics(home, "tuned")[0]["loss"] == pytest.approx(expected, rel=1e-6)
    settings = json.loads((home / "runs/tuned/config.json").read_text())
    assert settings.items() >= dataclasses.asdict(model.config).items()
    train(home, *options, "--checkpoint=runs/one", "--name=tuned-run")
    assert losses(home, "tuned-run") == pytest.approx(losses(home, "tuned"), rel=1e-6)


def test_a_model_that_is_a_link(home):
    """It is followed: the weights land where it points to."""
    (home / "large-disk").mkdir()
    (home / "runs/linked").mkdir(parents=True)
    (home / "runs/linked/model").symlink_to(home / "large-disk")
    train(home, "tiny.py", "--steps=1", "--name=linked")
    assert (home / "runs/linked/model").is_symlink()
    assert (home / "large-disk/config.json").exists()
    train(home, "tiny.py", "--steps=1", "--name=model", "--sample=ab")  # any name will do
    assert GPTOSS.from_checkpoint(home / "runs/model/model")


def test_foreign_lines_in_the_metrics(home):
    """They stay, and nothing fails because of them."""
    options = ("tiny.py", "--save_every=2", "--name=foreign")
    train(home, *options, "--steps=4")
    foreign = [
        "[1, 2]",
        "a note",
        "{}",
        '{"step": "3"}',
        '{"step": 1e999}',
        "7",
        "\x00",
        "[" * 9999,
    ]
    path = home / "runs/foreign/metrics.jsonl"
    path.write_text("\n".join([*foreign, path.read_text()]))
    train(home, *options, "--steps=6", "--resume")
    assert path.read_text().splitlines()[: len(foreign)] == foreign
    ours = [json.loads(line) for line in path.read_text().splitlines()[len(foreign) :]]
    assert [row["step"] for row in ours] == list(range(6))


FAKE_WANDB = """
import json

def init(**settings):
    with open("wandb.jsonl", "a") as file:
        file.write(json.dumps(settings) + "\\n")
    class Run:
        def log(self, values, step): assert values["step"] == step
    return Run()
"""


def with_fake_wandb(rank):
    sys.path.insert(0, str(Path.cwd()))


def test_weights_and_biases_continues_the_run(home):
    (home / "wandb.py").write_text(FAKE_WANDB)
    options = ("tiny.py", "--save_every=2", "--wandb", "--name=watched")
    train(home, *options, "--steps=2", ranks=2, prepare=with_fake_wandb)
    train(home, *options, "--steps=4", "--resume", ranks=2, prepare=with_fake_wandb)
    first, second = map(json.loads, (home / "wandb.jsonl").read_text().splitlines())
    assert first["id"] == second["id"] and second["resume"] == "allow"
    (home / "wandb.py").unlink()


def fails(*_, **__):
    raise RuntimeError("no LaTeX here")


def no_pictures(rank):
    from matplotlib.figure import Figure

    Figure.savefig = fails


def no_matplotlib(rank):
    sys.modules["matplotlib"] = None


def no_samples(rank):
    loop.sample.write = fails


@pytest.mark.parametrize(
    "prepare, said",
    [
        (no_pictures, "loss.png was not drawn: no LaTeX here"),
        (no_matplotlib, "loss.png is not drawn: matplotlib is not installed"),
        (no_samples, "no sample was written: RuntimeError: no LaTeX here"),
    ],
)
def test_what_comes_after_the_end_cannot_fail_the_run(home, prepare, said):
    if prepare is no_pictures:
        pytest.importorskip("matplotlib", reason="draws loss.png")
    name = f"--name={prepare.__name__}"
    text = train(home, "tiny.py", "--steps=2", name, "--sample=ab", prepare=prepare)
    assert text.count(said) == 1 and "weights are in" in text


def test_others_may_read_what_they_may_list(home, printed):
    modes = {path.stat().st_mode & 0o777 for path in (home / "runs/one/model").iterdir()}
    assert modes == {(home / "runs/one/metrics.jsonl").stat().st_mode & 0o777}


class StopInStep3:
    steps = 0  # in which the loop has asked; the thread of Watch asks, too

    @property
    def asked(self):
        StopInStep3.steps += threading.current_thread() is threading.main_thread()
        return StopInStep3.steps == 3


def stop_in_step_3(rank):
    loop.Stop = StopInStep3


def test_a_stop_in_the_last_step_changes_nothing(home):
    """The run is over all the same: it is evaluated, and its weights are written. One that stops a
    step earlier is neither."""
    for steps in (3, 4):
        arguments = ("tiny.py", f"--name=stopped-{steps}", f"--steps={steps}", "--eval_every=50")
        text = train(home, *arguments, prepare=stop_in_step_3)
        assert ("| held out" in text) == ("weights are in" in text) == (steps == 3)
        assert "saving the state after step 2" in text


def test_the_plot_is_drawn_at_every_evaluation(home):
    pytest.importorskip("matplotlib", reason="draws loss.png")
    options = ("tiny.py", "--steps=100000", "--eval_every=3", "--name=plotted")
    run = Run(home, *options).wait_for_step(4)
    assert (home / "runs/plotted/loss.png").exists()
    run.kill()
    run.wait()
    assert len(logged(home, "plotted")) > 4
