"""python -m bench --generate: its command on a CPU, and the bytes of its floor."""

import json

import pytest
import torch

from bench import __main__ as bench
from bench import generate
from common import tiny_config
from model import GPTOSS


def test_command(tmp_path, capsys):
    bench.main(["--generate", "--rows=1x8,2x5", "--layers=2", f"--out={tmp_path}"])
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "generate.json").read_text())["rows"]
    assert [(row["model"], row["sequences"], row["tokens"]) for row in rows] == [
        ("ours", 1, 8),
        ("ours", 2, 5),
    ]
    for row in rows:
        assert row["first_token"] > 0 and row["rate"] == pytest.approx(
            1e3 * row["sequences"] / row["ms"]
        )
    exact = [line for line in printed.splitlines() if line.startswith("fp32, 2 layers")]
    assert len(exact) == 2 and all("24 of 24 tokens equal" in line for line in exact)
    said = printed[printed.index("fp32, 2 layers") :]
    assert said.count("8 of 8 tokens equal; log p differs by") == 6
    with pytest.raises(SystemExit):
        bench.main(["--generate", "--rows=0x8"])


def test_bytes_of_a_step():
    """Many tokens read every matrix but the embedding; one reads the experts that it chose."""
    config = tiny_config()
    with torch.device("meta"):
        model = GPTOSS(config)
    named = model.named_parameters()
    matrices = [p.numel() for name, p in named if p.dim() > 1 and name.endswith("weight")]
    routers = sum(block.mlp.router.weight.numel() for block in model.blocks)
    everything = sum(matrices) - routers - model.embedding.weight.numel()
    assert generate.bytes_read(config, 10**6) == pytest.approx(2 * everything)
    experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
    unused = experts * (1 - config.experts_per_token / config.num_experts)
    assert generate.bytes_read(config, 1) == pytest.approx(2 * (everything - unused))
