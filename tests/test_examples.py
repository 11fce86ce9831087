"""examples/: transformers' own model on slices of sequences against the same model on one rank;
the Slurm script."""

import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import sp
from common import assert_all_close, batch, gradients, relative, run_ranks, tiny_config, twins
from conftest import ROOT

B, S = 2, 24

# --------------------------------------------------------------------------------------------------
# transformers_ulysses.py


def theirs():
    """GptOssForCausalLM with noise in every parameter and two key-value heads, and a batch."""
    config = tiny_config(num_attention_heads=4, num_key_value_heads=2)
    return twins(config)[1], *batch(config, B, S)


def step(model, tokens, targets, count):
    """The logits of a call, and the gradients of its loss over `count` targets."""
    out = model(tokens, labels=targets, shift_labels=targets, num_items_in_batch=count)
    out.loss.backward()
    return out.logits.detach(), {"loss": out.loss.detach(), **gradients(model)}


def parallel():
    from examples.transformers_ulysses import parallelize

    sp.init(init_device_mesh("cpu", (dist.get_world_size(),)))
    model, tokens, targets = theirs()
    return parallelize(model), tokens, targets


def on_ranks():
    """This rank's logits and gradients; and the messages of calls that would be wrong."""
    model, tokens, targets = parallel()
    count = (targets != -100).sum()
    mine, wanted = sp.shard(tokens, targets)
    found = step(model, mine, wanted, count)
    refused = []
    for wrong in (
        {"position_ids": sp.positions(S // sp.size())[None] + 1},
        {"labels": wanted},
        {"attention_mask": torch.arange(S // sp.size()).expand_as(mine) > 0},
    ):
        with pytest.raises(ValueError) as error:
            model(mine, **wrong)
        refused.append(str(error.value))
    with torch.no_grad():  # embeddings instead of tokens: positions are found there too
        again = model(inputs_embeds=model.get_input_embeddings()(mine)).logits
        sinks = [layer.self_attn.sinks for layer in model.model.layers]
        for x in sinks:
            x.fill_(-1e9)  # as good as none
        without = model(mine).logits
    model.model._forward_pre_hooks.clear()  # as who registers the attention function alone
    if sp.rank() > 0:  # rank 0's positions are right: it would wait for the others
        with pytest.raises(ValueError) as error:
            model(mine)
        refused.append(str(error.value))
    return *found, refused, again, without


@pytest.mark.parametrize("ranks", [2, 4])
def test_transformers_on_ranks_equals_one(ranks):
    """4 ranks are more than there are key-value heads."""
    model, tokens, targets = theirs()
    logits, expected = step(model, tokens, targets, (targets != -100).sum())
    found = run_ranks(ranks, on_ranks)
    assert relative(torch.cat([part[0] for part in found], dim=1), logits) <= 1e-6
    sums = {name: sum(part[1][name] for part in found) for name in expected}
    assert_all_close(sums, expected, 1e-5)
    for r, (*_, (positions, labels, mask, *no_positions), again, without) in enumerate(found):
        assert torch.equal(again, found[r][0])
        assert f"rank {r} of {ranks}: got {r * S // ranks + 1} to" in positions
        for message in no_positions:  # silently, the logits would be a third wrong
            assert f"got 0 to {S // ranks - 1}, want" in message
            assert f"starts at {r * S // ranks}" in message
        assert "shift them before sp.shard" in labels and "padding" in mask
        assert relative(without, found[r][0]) > 1e-2  # the sinks took part


# --------------------------------------------------------------------------------------------------
# slurm.sh

SLURM = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
SLURM |= {"SLURM_JOB_NODELIST": "node[7-8]"}
FAKES = {  # what Slurm has, and torchrun, each of which prints what it is told
    "scontrol": 'echo "$@" >> told; printf "node7\\nnode8\\n"',
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "torchrun": 'printf "%s\\n" "$@" > launched; kill -USR1 $$; echo alive >> launched',
}


def test_slurm(tmp_path):
    """Its syntax; what torchrun gets; and that SIGUSR1, which reaches every process, spares it."""
    script = ROOT / "examples/slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    told = [script, "configs/gptoss_120b.py", "--name=a b"]
    subprocess.run(told, cwd=tmp_path, env=os.environ | SLURM | {"PATH": path}, check=True)
    assert (tmp_path / "told").read_text() == "show hostnames node[7-8]\n"
    *launch, last = (tmp_path / "launched").read_text().splitlines()
    assert last == "alive" and launch == [
        "--nnodes=2", "--nproc_per_node=4", "--rdzv_backend=c10d",
        "--rdzv_endpoint=node7:21234", "--rdzv_id=41234",
        "train.py", "configs/gptoss_120b.py", "--name=a b", "--resume",
    ]  # fmt: skip
