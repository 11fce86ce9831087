"""train.py: the real loop on one, two and four ranks, and the same numbers from all of them."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from common import batch, run_ranks, tiny_config
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from runs import NO_GPU, TINY, Run, losses, make_home, metrics, train, write_corpus
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import fast
import train as loop
from data import TokenData
from loop import log
from loop.budget import flops_of, flops_per_token
from loop.guards import memory_advice
from loop.options import Options, model_config, parse
from model import GPTOSS, IGNORED
from weights import weight_files

SAVES = ("--save_every=10", "--keep=9")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("train"))


def tiny_options(**changes):
    assigned = {}
    exec(TINY, assigned)
    del assigned["__builtins__"]
    return Options(**{**assigned, **changes})


def fresh_model(options):
    model = GPTOSS(model_config(options))
    model.init_weights(options.seed)
    return model


def whole_batch(home, options, data, rows):
    order = {"seed": options.seed, "long_documents": options.long_documents}
    return TokenData(str(home / data), options.seq_len, **order).batch(rows)


# ----------------------------------------------------------------------------------------------------------------------
# The same run on any number of ranks

RUNS = {  # name: ranks, options
    "one": (1, [*SAVES, "--eval_every=25", "--eval_rows=7", "--sample=ab", "--sample_tokens=5"]),
    "one-micro-batch": (1, ["--micro_batch=4", "--recompute=all"]),
    "two": (2, [*SAVES, "--eval_every=25", "--eval_rows=7"]),
    "two-sp": (2, ["--sp=2", "--eval_every=25", "--eval_rows=7", "--micro_batch=2"]),
    "four-sp": (4, ["--sp=2", "--micro_batch=2", "--eval_every=25", "--eval_rows=7"]),
    "four-sp-replicas": (4, ["--sp=2", "--replicas=2", "--micro_batch=2"]),
}


@pytest.fixture(scope="module")
def printed(home):
    """{name of a run: what it printed}"""
    return {
        name: train(home, "tiny.py", f"--name={name}", *options, ranks=ranks)
        for name, (ranks, options) in RUNS.items()
    }


def assert_same_losses(home, name, other, tolerance=1e-5):
    ours, theirs = losses(home, name), losses(home, other)
    assert len(ours) == len(theirs)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    assert worst <= tolerance, f"{name} against {other}: relative difference {worst:.1e}"


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_losses_are_those_of_one_rank(home, printed, name):
    assert len(losses(home, "one")) == 50 and losses(home, "one")[-1] < losses(home, "one")[0] - 0.5
    assert_same_losses(home, name, "one")
    norms = [[row["grad_norm"] for row in metrics(home, run)] for run in (name, "one")]
    assert max(abs(a - b) / b for a, b in zip(*norms)) < 1e-3
    loads = [[row["expert_load"] for row in metrics(home, run)] for run in (name, "one")]
    assert (
        max(abs(a - b) / b for a, b in zip(*loads)) < 0.05
    )  # a token between two experts may choose the other


def sharded_gradients(ranks, optimizer, in_fp32):
    """{name: gradient}, whole, of a bf16 model over `ranks` ranks that each have tokens of their own."""
    config = tiny_config(
        hidden_size=24, intermediate_size=16
    )  # grouped matmuls in bf16 want sizes that 8 divides
    options = Options(
        **dataclasses.asdict(config),
        batch_size=ranks,
        optimizer=optimizer,
        recompute="all",
        keep_blocks=2,
    )
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))

    def policy(**settings):
        assert settings["reduce_dtype"] == (torch.float32 if optimizer == "fp32" else torch.bfloat16)
        return MixedPrecisionPolicy(
            **settings | ({"reduce_dtype": torch.float32} if in_fp32 else {})
        )

    def reduce_scatter(module, device, dtype):
        assert dtype == (torch.bfloat16 if ranks <= 2 and optimizer == "split" else torch.float32)
        return ReduceScatter(module, device, torch.float32 if in_fp32 else dtype)

    ReduceScatter = loop.ReduceScatter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MixedPrecisionPolicy", policy)
        patch.setattr(loop, "ReduceScatter", reduce_scatter)
        model = loop.build_model(options, config, torch.device("cpu"), mesh, torch.bfloat16)
    assert (model.recompute, model.keep_blocks) == ("all", 2)
    tokens, targets = batch(config, 2, 16, seed=dist.get_rank())
    model(tokens, targets, count=torch.tensor(24 * ranks)).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "ranks, optimizer", [(1, "split"), (2, "split"), (4, "split"), (2, "fp32")]
)
def test_bf16_sums_are_as_exact_as_fp32_ones(ranks, optimizer):
    found, expected = (
        run_ranks(ranks, sharded_gradients, ranks, optimizer, in_fp32)[0]
        for in_fp32 in (False, True)
    )
    assert {g.dtype for g in found.values()} == {
        torch.float32 if optimizer == "fp32" else torch.bfloat16
    }
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def questions_of_the_reduce_scatter(optimizer):
    """For each of three micro-batches, of which the third follows an update, whether its sums became the gradients."""
    config, ranks = tiny_config(hidden_size=24, intermediate_size=16), dist.get_world_size()
    options = Options(**dataclasses.asdict(config), batch_size=ranks, optimizer=optimizer)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))
    model, answers = (
        loop.build_model(options, config, torch.device("cpu"), mesh, torch.bfloat16),
        [],
    )

    def allocate(self, *args, **kwargs):
        answers[-1].add(self.makes_the_gradient())
        return original(self, *args, **kwargs)

    original = loop.ReduceScatter.allocate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.ReduceScatter, "allocate", allocate)
        for follows_an_update in (False, False, True):
            if follows_an_update:
                model.zero_grad()
            answers.append(set())
            model(*batch(config, 1, 16)).backward()
    return answers


@pytest.mark.parametrize(
    "ranks, optimizer", [(1, "split"), (2, "split"), (4, "split"), (2, "fp32")]
)
def test_whose_memory_gradients_take(ranks, optimizer):
    """The computation's, for what becomes a gradient. FSDP's own for what is added to one."""
    for answers in run_ranks(ranks, questions_of_the_reduce_scatter, optimizer):
        assert answers == [{True}, {False}, {True}]


def without_fast_twins(rank):
    def broken(*_):
        raise AssertionError("a fast twin ran")

    for name, (definition, _) in fast.PAIRS.items():
        fast.PAIRS[name] = definition, broken


def test_fast_false_runs_the_definitions(home, printed):
    """Forward, backward and evaluation, with every fast twin broken."""
    arguments = ("tiny.py", "--name=plain", "--recompute=all", "--eval_every=5", "--steps=5")
    Run(home, *arguments, "--fast=false", prepare=without_fast_twins).ends_well()
    assert losses(home, "plain") == pytest.approx(losses(home, "one")[:5], rel=1e-5)
    broken = Run(home, *arguments[2:], "tiny.py", "--name=broken", prepare=without_fast_twins)
    assert broken.wait() == [1] and "a fast twin ran" in broken.text()


FROZEN = ("embedding.weight", "blocks.0.mlp.down_weight", "blocks.1.attention.sinks")


def freeze_some(rank):
    build = loop.build_model

    def build_model(*arguments):
        model = build(*arguments)
        for name in FROZEN:
            model.get_parameter(name).requires_grad_(False)
        return model

    loop.build_model = build_model


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
def test_frozen_parameters(home, optimizer):
    """They get no update, no weight decay, no optimizer state, and are no part of a saved state."""
    name, resumed = f"frozen-{optimizer}", f"frozen-{optimizer}-again"
    arguments = ("tiny.py", f"--optimizer={optimizer}", "--steps=6", "--save_every=3")
    arguments += ("--weight_decay=0.1", "--sp=2")
    for run in (name, resumed):
        if run == resumed:
            copy_run(home, name, resumed, 3)
        options = (*arguments, f"--name={run}", "--resume=true")
        Run(home, *options, ranks=2, prepare=freeze_some).ends_well()
    old = fresh_model(tiny_options()).to(torch.float32 if optimizer == "fp32" else torch.bfloat16)
    new = GPTOSS.from_checkpoint(home / "runs" / name / "model")
    for (parameter, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(p.float(), q.float()) == (parameter in FROZEN), parameter
    saved = set()
    for path in (home / "runs" / name / "states/step-00000006").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            saved |= set(file.keys())
    kinds = ("", "exp_avg.", "exp_avg_sq.") + (("rest.",) if optimizer == "split" else ())
    names = dict(old.named_parameters()).keys() - set(FROZEN)
    assert saved == {kind + parameter for kind in kinds for parameter in names}
    assert losses(home, resumed) == losses(home, name)
    assert_same_weights(home, resumed, name)


def test_first_step_against_the_model_alone(home, printed):
    options = tiny_options()
    tokens, targets, documents = whole_batch(home, options, "corpus", range(4))
    model, loads = fresh_model(options), []
    for block in model.blocks:
        count = lambda router, _, out: loads.append(out[0].flatten().bincount().double())  # noqa: E731
        block.mlp.router.register_forward_hook(count)
    loss = model(tokens, targets, documents)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    first = metrics(home, "one")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert first["expert_load"] == pytest.approx(
        sum((x.max() / x.mean()).item() for x in loads) / len(loads), rel=1e-6
    )


def held_out(home, name):
    rows = map(json.loads, (home / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}


def test_evaluation_does_not_depend_on_the_ranks(home, printed):
    """Seven rows, which neither two groups of ranks nor micro-batches of two divide."""
    expected = held_out(home, "one")
    assert list(expected) == [24, 49]
    for name in ("two", "two-sp", "four-sp"):
        assert held_out(home, name) == pytest.approx(expected, rel=1e-5)
    model = GPTOSS.from_checkpoint(home / "runs/one/model")
    with torch.no_grad():
        loss = model(*whole_batch(home, tiny_options(), "held-out", range(7)))
    assert expected[49] == pytest.approx(loss.item(), rel=1e-6)


def test_evaluation_takes_no_row_twice(home):
    rows = TokenData(str(home / "held-out"), 32).sequences_per_epoch
    for eval_rows in (rows, 3 * rows):
        train(
            home,
            "tiny.py",
            "--steps=1",
            "--eval_every=1",
            f"--eval_rows={eval_rows}",
            f"--name=eval-{eval_rows}",
        )
    assert held_out(home, f"eval-{rows}") == held_out(home, f"eval-{3 * rows}")


@pytest.mark.parametrize("ranks, sp", [(1, 1), (2, 1), (2, 2)])
def test_ranks_with_few_or_no_targets(home, ranks, sp):
    """Three targets in a hundred count: many a row, and so many a rank, has none of them."""
    if not (home / "sparse").exists():
        write_corpus(home / "sparse", counted=0.03)
    name, model = f"sparse-{ranks}-{sp}", fresh_model(tiny_options())
    train(
        home, "tiny.py", "--data=sparse", "--steps=8", f"--sp={sp}", f"--name={name}", ranks=ranks
    )
    batches = [
        whole_batch(home, tiny_options(), "sparse", range(4 * step, 4 * step + 4))
        for step in range(8)
    ]
    counts = [[(row != IGNORED).sum().item() for row in targets] for _, targets, _ in batches]
    assert all(map(sum, counts)) and any(0 in rows for rows in counts)
    assert metrics(home, name)[0]["loss"] == pytest.approx(model(*batches[0]).item(), rel=1e-6)
    assert_same_losses(home, name, "sparse-1-1")


# ----------------------------------------------------------------------------------------------------------------------
# Output


def test_metrics_and_lines(home, printed):
    rows = metrics(home, "two")
    fields = {
        "step",
        "loss",
        "grad_norm",
        "lr",
        "expert_load",
        "ms",
        "tokens_per_s",
        "tokens_per_s_per_rank",
        "eta_s",
    }
    assert all(row.keys() == fields for row in rows)
    lines = [line for line in printed["two"].splitlines() if re.match(r"step \d+ \| loss", line)]
    assert len(lines) == len(rows) == 50
    for line, row in zip(lines, rows):
        assert line == log.format_line(row)
        assert (
            f"loss {row['loss']:.4f} | grad norm {row['grad_norm']:.3f} | lr {row['lr']:.2e}"
            in line
        )
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / (row["ms"] / 1000))
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 2)
        assert row["eta_s"] == pytest.approx(row["ms"] / 1000 * (49 - row["step"]))
        assert row["expert_load"] >= 1
    assert "memory nearly full, 3 stops so far" in log.format_line(rows[0] | {"alloc_retries": 3})
    assert "memory" not in log.format_line(rows[0] | {"alloc_retries": 0})
    assert "step 49 | held out" in printed["two"]
    assert not [
        line for output in printed.values() for line in output.splitlines() if "Warning" in line
    ]
    assert (
        "128 tokens a step = 2 micro-batches x 2 groups (sp 1) x 1 sequence x 32 tokens"
        in printed["two"]
    )


def test_flops_of_packed_documents():
    """Each piece is a sequence of its own; a later number that comes again is another piece."""
    config = model_config(tiny_options())
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [0] * 6])
    expected = sum(n * flops_per_token(config, n) for n in (3, 2, 1, 6))
    assert flops_of(config, documents) == pytest.approx(expected)
    assert flops_of(config, documents) < 12 * flops_per_token(config, 6)


def on_a_gpu_of_a_gigaflop(rank):
    log.peak_flops = lambda device: 1e9


@pytest.mark.parametrize("sp", [1, 2])
def test_mfu(home, sp):
    """Of the documents that were in the batch, whatever the ranks."""
    arguments = ("tiny.py", f"--name=mfu-{sp}", "--steps=2", f"--sp={sp}", "--micro_batch=2")
    Run(home, *arguments, ranks=2, prepare=on_a_gpu_of_a_gigaflop).ends_well()
    config = model_config(tiny_options())
    for row in metrics(home, f"mfu-{sp}"):
        _, _, documents = whole_batch(
            home, tiny_options(), "corpus", range(4 * row["step"], 4 * row["step"] + 4)
        )
        assert documents.any()
        assert row["mfu"] == pytest.approx(
            flops_of(config, documents) / (row["ms"] / 1000) / 2 / 1e9
        )


class StopInStep3:
    steps = 0

    @property
    def asked(self):
        StopInStep3.steps += 1
        return StopInStep3.steps == 3


def stop_in_step_3(rank):
    loop.Stop = StopInStep3


def test_a_stop_in_the_last_step_changes_nothing(home):
    """The run is over all the same: it is evaluated, and its weights are written. A step earlier, neither."""
    for steps in (3, 4):
        arguments = (
            "tiny.py",
            f"--name=stopped-{steps}",
            f"--steps={steps}",
            "--eval_every=50",
            "--eval_rows=4",
        )
        printed = Run(home, *arguments, prepare=stop_in_step_3).ends_well().text()
        assert ("held out" in printed) == ("weights are in" in printed) == (steps == 3)
        assert "saving the state after step 2" in printed


def test_files_of_a_run(home, printed):
    run = home / "runs/one"
    settings = json.loads((run / "config.json").read_text())
    assert settings.pop("tokenizer") == "bytes"
    assert settings == dataclasses.asdict(
        tiny_options(
            name="one",
            save_every=10,
            keep=9,
            eval_every=25,
            eval_rows=7,
            sample="ab",
            sample_tokens=5,
        )
    )
    assert {path.name for path in run.iterdir()} - {"loss.png"} == {
        "config.json",
        "metrics.jsonl",
        "states",
        "model",
    }
    assert [path.name for path in sorted((run / "states").iterdir())] == [
        f"step-{n:08d}" for n in (10, 20, 30, 40, 50)
    ]
    assert "weights are in runs/one/model\nab" in printed["one"]
    pytest.importorskip("matplotlib", reason="draws loss.png")
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "config, gigabytes, sizes",
    [
        ("gptoss_64k", 80, {}),
        ("gptoss_128k_2gpu", 141, {}),
        ("gptoss_120b", 141, {"num_hidden_layers": 36, "num_experts": 128}),
    ],
)
def test_configs_fit_their_gpus(config, gigabytes, sizes, monkeypatch, capsys):
    """With four gigabytes to spare for CUDA and NCCL."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assigned = [f"--{name}={value}" for name, value in sizes.items()]
    loop.dry_run(parse([str(ROOT / "configs" / f"{config}.py"), "--checkpoint=", *assigned], ""))
    printed = capsys.readouterr().out
    peak = re.search(r"([\d.]+) GiB  peak of each", printed)
    assert ("8.8 GiB  of host memory" in printed) == (
        config == "gptoss_128k_2gpu"
    )  # 65,536 tokens x 25 x 5,760 bytes
    assert 0.5 * gigabytes * 1e9 < float(peak[1]) * 2**30 < (gigabytes - 4) * 1e9


def test_dry_run(home):
    """In a process of its own, as anyone would start it."""
    command = [
        sys.executable,
        ROOT / "train.py",
        "tiny.py",
        "--dry_run=true",
        "--ranks=4",
        "--sp=2",
        "--name=dry",
    ]
    text = subprocess.run(
        command, cwd=home, env=NO_GPU, capture_output=True, text=True, timeout=120, check=True
    ).stdout
    parameters = sum(p.numel() for p in fresh_model(tiny_options()).parameters())
    assert f"{parameters:,} parameters, optimizer fp32 at 16 bytes each" in text
    assert (
        "2 micro-batches x 2 groups (sp 2) x 1 sequence x 32 tokens" in text
        and "GiB  peak of each of 4 GPUs" in text
    )
    assert "FLOPs, if each sequence is one document\n" in text, "nothing is recomputed"
    assert not (home / "runs/dry").exists()


def test_one_rank_prints_a_dry_run(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        loop.dry_run(Options(batch_size=2))
        assert bool(capsys.readouterr().out) == (rank == "0")


def test_advice_when_memory_runs_out():
    """The cheapest first, and nothing that would not help."""
    keeping = memory_advice(Options(recompute="attention", keep_blocks=3, optimizer="split"))
    assert keeping.startswith(
        "out of memory: try a smaller --keep_blocks, then --offload=true --keep_blocks=0 ("
    )
    assert "optimizer" not in keeping and "micro_batch" not in keeping
    nothing = memory_advice(Options(recompute="none", keep_blocks=3, micro_batch=2))
    assert nothing.startswith(
        "out of memory: try --recompute=attention, then a smaller --micro_batch, then --optimizer=split ("
    )
    last = memory_advice(Options(offload=True, optimizer="bf16"))
    assert last == "out of memory: try a larger --sp over more GPUs, or a shorter --seq_len"


def test_dry_run_counts_every_option_of_memory(monkeypatch, capsys):
    """Each of these changes what the dry run prints."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    changes = (
        {"keep_blocks": 2},
        {"recompute": "none"},
        {"offload": True},
        {"optimizer": "bf16"},
        {"micro_batch": 2},
        {"sp": 2},
    )
    printed = set()
    for change in {}, *changes:
        loop.dry_run(Options(**{"ranks": 4, "seq_len": 2**17, "recompute": "attention", **change}))
        printed.add(capsys.readouterr().out)
    assert (
        len(printed) == 7 and sum(" more for what is recomputed" in text for text in printed) == 6
    )


# ----------------------------------------------------------------------------------------------------------------------
# Learning rate, decay, optimizers


def test_learning_rate():
    options = tiny_options(steps=100, warmup_steps=10, lr=2.0, final_lr=0.1)
    rates = [loop.learning_rate(options, step) for step in range(101)]
    assert rates[:11] == pytest.approx([0.2 * (step + 1) for step in range(10)] + [2.0])
    assert rates[55] == pytest.approx(2 * (0.1 + 0.9 / 2)) and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert (
        loop.learning_rate(tiny_options(steps=1, warmup_steps=0), 0) == 1e-3
    )  # nothing divides by zero


def test_learning_rate_is_applied(home, printed):
    options = tiny_options()
    assert [row["lr"] for row in metrics(home, "one")] == [
        loop.learning_rate(options, step) for step in range(50)
    ]
    train(
        home,
        "tiny.py",
        "--steps=2",
        "--warmup_steps=0",
        "--lr=1e-30",
        "--final_lr=1",
        "--name=still",
    )
    old, new = fresh_model(options), GPTOSS.from_checkpoint(home / "runs/still/model")
    for (name, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-20), name


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
def test_decay_is_for_matrices(optimizer):
    """Of the biases those of the experts have two dimensions, and are no matrices."""
    options = tiny_options(weight_decay=0.1, optimizer=optimizer)
    model = GPTOSS(model_config(options))
    names = {p: name for name, p in model.named_parameters()}
    groups = loop.build_optimizer(options, model).param_groups
    decayed = {
        names[p] for group in groups if group["weight_decay"] == 0.1 for p in group["params"]
    }
    others = {names[p] for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    matrices = {
        f"blocks.{n}.{part}"
        for n in (0, 1)
        for part in ("attention.qkv.weight", "attention.out.weight")
    }
    matrices |= {
        f"blocks.{n}.mlp.{part}"
        for n in (0, 1)
        for part in ("router.weight", "gate_up_weight", "down_weight")
    }
    assert decayed == matrices | {"embedding.weight", "unembedding.weight"}
    assert decayed | others == set(names.values()) and not decayed & others


def test_split_follows_fp32_and_bf16_does_not(home):
    """At a learning rate far below bf16's resolution of the weights."""
    dropped = {}
    for optimizer in ("fp32", "split", "bf16"):
        name = f"optimizer-{optimizer}"
        train(
            home,
            "tiny.py",
            f"--optimizer={optimizer}",
            "--lr=1e-5",
            "--warmup_steps=0",
            "--steps=30",
            f"--name={name}",
        )
        curve = losses(home, name)
        dropped[optimizer] = sum(curve[:5]) - sum(curve[-5:])
    assert dropped["split"] == pytest.approx(dropped["fp32"], rel=0.02)
    assert abs(dropped["bf16"] - dropped["fp32"]) > 0.1 * abs(dropped["fp32"])


def test_clipping(home):
    """The norm in the log is the one before clipping; clipped gradients move Adam's first moments, not its first step."""
    train(home, "tiny.py", "--steps=1", "--save_every=1", "--name=free", "--grad_clip=0")
    train(
        home,
        "tiny.py",
        "--steps=1",
        "--save_every=1",
        "--name=clipped",
        "--grad_clip=0.01",
        ranks=2,
    )
    from safetensors.torch import load_file

    def moments(name):
        files = sorted((home / "runs" / name / "states/step-00000001").glob("*.safetensors"))
        tensors = [
            x for file in files for key, x in load_file(file).items() if key.startswith("exp_avg.")
        ]
        return torch.stack([x.norm() for x in tensors]).norm().item() / 0.1

    norm = metrics(home, "free")[0]["grad_norm"]
    assert metrics(home, "clipped")[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert moments("free") == pytest.approx(norm, rel=1e-5)
    assert moments("clipped") == pytest.approx(0.01, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming


def copy_run(home, name, copy, step):
    """A copy of a run as it was when the state after `step` steps was its newest."""
    shutil.copytree(home / "runs" / name, home / "runs" / copy)
    for state in (home / "runs" / copy / "states").iterdir():
        if int(state.name[-8:]) > step:
            shutil.rmtree(state)
    shutil.rmtree(home / "runs" / copy / "model")


def assert_same_weights(home, name, other):
    """To the last bit."""
    ours, theirs = (GPTOSS.from_checkpoint(home / "runs" / run / "model") for run in (name, other))
    for (parameter, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q), parameter


def test_resumed_on_one_device_to_the_last_digit(home, printed):
    copy_run(home, "one", "again", 20)
    with open(home / "runs/again/metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')  # what a full disk leaves of a line
    text = train(home, "tiny.py", "--name=again", "--resume=true", *RUNS["one"][1])
    assert "goes on after step 19\n" in text and "step 19 |" not in text and "step 20 |" in text
    assert losses(home, "again") == losses(home, "one")
    assert held_out(home, "again") == held_out(home, "one")
    assert_same_weights(home, "again", "one")


def test_resumed_after_the_end_only_writes_the_weights(home, printed):
    copy_run(home, "one", "done", 50)
    text = train(home, "tiny.py", "--name=done", "--resume=true", *RUNS["one"][1])
    assert "step 49 |" not in text and losses(home, "done") == losses(home, "one")
    assert_same_weights(home, "done", "one")


@pytest.mark.parametrize(
    "name, ranks, options",
    [("one", 2, ["--sp=2"]), ("two", 1, []), ("two", 4, ["--sp=2"]), ("two", 4, ["--replicas=2"])],
)
def test_resumed_on_another_number_of_ranks(home, printed, name, ranks, options):
    copy = f"{name}-on-{ranks}-{len(''.join(options))}"
    copy_run(home, name, copy, 40)
    assert "goes on after step 39\n" in train(
        home, "tiny.py", f"--name={copy}", "--resume=true", *options, ranks=ranks
    )
    assert_same_losses(home, copy, name)


def test_resumed_with_split_optimizer(home):
    """The low halves of the master weights and the bf16 moments come back too."""
    options = ["--optimizer=split", "--steps=12", "--save_every=6"]
    train(home, "tiny.py", "--name=split", *options)
    copy_run(home, "split", "split-again", 6)
    train(home, "tiny.py", "--name=split-again", "--resume=true", *options)
    assert losses(home, "split-again") == losses(home, "split")
    assert_same_weights(home, "split-again", "split")


def test_companions_travel_with_the_weights(home, printed):
    """What convert_hf.py put beside the weights lies beside the trained ones, and nothing else does."""
    shutil.copytree(home / "runs/one/model", home / "converted")
    companions = (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
    )
    companions += ("generation_config.json", "hf_config.json")
    for name in (*companions, "README.md"):
        (home / "converted" / name).write_text(name)
    options = [
        "--checkpoint=converted",
        "--data=corpus",
        "--seq_len=32",
        "--steps=1",
        "--name=tuned",
    ]
    train(home, *options, ranks=2)
    tuned = home / "runs/tuned/model"
    weights = {path.name for path in weight_files(tuned).values()} | {
        "model.safetensors.index.json",
        "config.json",
    }
    assert {path.name for path in tuned.iterdir()} == weights | set(companions)
    assert all((tuned / name).read_text() == name for name in companions)
    expected = GPTOSS.from_checkpoint(home / "converted")(
        *whole_batch(home, tiny_options(), "corpus", range(8))
    ).item()
    assert metrics(home, "tuned")[0]["loss"] == pytest.approx(expected, rel=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Options


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], "usage")
    assert not stop.value.code
    text = capsys.readouterr().out
    for field in dataclasses.fields(Options):
        (line,) = [
            line for line in text.splitlines() if line.split("=")[0].strip() == f"--{field.name}"
        ]
        assert len(line.split(maxsplit=1)[1].split()) > 1, f"{field.name} has no meaning"


@pytest.mark.parametrize(
    "wrong",
    [
        "--offload=true --recompute=none",
        "--offload=true --keep_blocks=1",
        "--optimizer=split --beta2=0.999",
        "--optimizer=bf16 --beta2=0.999",
        "--optimizer=split --beta1=0.995",
    ],
)
def test_options_that_exclude_each_other(wrong):
    """Found as they are read: a dry run, or a GPU that has loaded the weights, would be too late."""
    with pytest.raises(ValueError, match=wrong.split("=")[-1].split()[0]):
        parse(wrong.split(), "")


def test_config_file_then_command_line(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import math\n_helper = 3\nlr = 1\nseq_len = 64 * 2\nsample = 'a=b'\n"
    )
    options = parse(
        [
            "--steps=7",
            str(tmp_path / "mine.py"),
            "--seq_len=96",
            "--offload=True",
            "--eval_data=x=y",
        ],
        "",
    )
    assert (options.name, options.lr, options.seq_len, options.steps) == ("mine", 1, 96, 7)
    assert options.offload is True and options.sample == "a=b" and options.eval_data == "x=y"
    assert (
        parse([], "") == Options(name="run")
        and parse([str(tmp_path / "mine.py"), "--name="], "").name == "mine"
    )


@given(st.data())
def test_any_value_of_the_right_type_arrives_and_others_are_named(data):
    field = data.draw(st.sampled_from(dataclasses.fields(Options)))
    text = data.draw(
        st.one_of(
            st.integers().map(str),
            st.floats().map(repr),
            st.sampled_from(["true", "False"]),
            st.text(),
        )
    )
    try:
        value = getattr(parse([f"--{field.name}={text}"], ""), field.name)
    except ValueError as error:
        assert field.name in str(error) and "\n" not in str(error).replace(text, "")
    else:
        assert type(value) is field.type
        expected = text.lower() == "true" if field.type is bool else field.type(text)
        expected = expected or "run" if field.name == "name" else expected
        assert value == expected and not (field.type is float and math.isnan(value))
