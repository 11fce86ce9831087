"""ablation.py: what it puts in the place of an optimisation computes the same. Compiled leaves and cuDNN are a GPU's: on a CPU
these two changes change nothing."""

import re

import pytest
from ablation import CHANGES, LEAVES, main
from common import assert_all_close, batch, gradients, noise_, tiny_config
from conftest import ROOT

from model import GPTOSS


def outcome(recompute):
    config = tiny_config()
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


def test_leaves_are_all_that_is_compiled():
    compiled = re.findall(r"^@fused\ndef (\w+)", (ROOT / "model.py").read_text(), re.MULTILINE)
    assert sorted([*LEAVES, "flex_sink_attention"]) == sorted(compiled)


def test_it_prints_a_row_each(tmp_path, capsys):
    main(["--rows=32", f"--out={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(what) for line in lines) for what, *_ in CHANGES)
    assert (tmp_path / "ablation.json").exists()
