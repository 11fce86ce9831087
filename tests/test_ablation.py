"""bench/ablation.py: each change computes the same as the model, and each does change what runs.

Compiled leaves and cuDNN exist only on a GPU: on a CPU these two changes have no effect."""

import re

import pytest
import torch

import fast
from bench import __main__ as bench
from bench import ablation
from bench.ablation import CHANGES
from common import assert_all_close, batch, gradients, noise_, tiny_config
from conftest import ROOT
from model import GPTOSS

SIZES = {"hidden_size": 24, "intermediate_size": 16}  # that every fast twin can take


def outcome(recompute):
    config = tiny_config(**SIZES)
    tokens, targets = batch(config, 2, 30)
    model = noise_(GPTOSS(config, recompute))
    loss = model(tokens, targets)
    loss.backward()
    return {"loss": loss.detach(), **gradients(model)}


@pytest.mark.parametrize("what, recompute, change", CHANGES, ids=[what for what, *_ in CHANGES])
def test_a_change_computes_the_same(what, recompute, change):
    expected = outcome(recompute)
    with change():
        actual = outcome(recompute)
    assert_all_close(actual, expected, 1e-5)


@pytest.mark.parametrize("name", ablation.PAIRS)
def test_a_pair_off_runs_its_definition(name, monkeypatch):
    """Its fast twin is not called, and the others are."""
    called = set()

    def watched(name, twin):
        def call(*args):
            called.add(name)
            return twin(*args)

        return call

    for other, (definition, twin) in list(fast.PAIRS.items()):
        monkeypatch.setitem(fast.PAIRS, other, (definition, watched(other, twin)))
    outcome("none")
    everything = set(called)
    called.clear()
    with ablation.off(name)():
        outcome("none")
    assert name not in called
    assert everything - called <= {name}, "the other fast twins run"


def test_leaves_are_what_is_compiled():
    """All that is @fused, but FlexAttention, which must be."""
    files = "model.py", "fast.py", "flash.py"
    sources = "".join((ROOT / file).read_text() for file in files)
    marked = re.findall(r"^@fused\ndef (\w+)", sources, re.MULTILINE)
    assert sorted([*ablation.LEAVES, "flex_sink_attention"]) == sorted(set(marked))


def test_recomputed_blocks_run_in_full(monkeypatch):
    """The second run then computes the experts' output, which the fast one skips."""
    lengths = []
    grouped_mm = torch.nn.functional.grouped_mm

    def watched(*args, **kwargs):
        lengths.append(1)
        return grouped_mm(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", watched)
    outcome("all")
    usual = len(lengths)
    with ablation.replayed_in_full():
        outcome("all")
    assert len(lengths) - usual > usual


def test_it_prints_a_row_for_each_change(tmp_path, capsys):
    bench.main(["--ablation", "--rows=32", f"--out={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(what) for line in lines) for what, *_ in CHANGES)
    assert sum(line.startswith("none") for line in lines) == 3  # nothing changed, three recomputes
    assert (tmp_path / "ablation.json").exists()
