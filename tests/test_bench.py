"""bench/: its arithmetic against numbers worked out by hand, and its commands on a CPU with a tiny
model."""

import argparse
import json
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

import train
from bench import (
    __main__ as bench,
)
from bench import (
    accuracy,
    determinism,
    documents,
    kernels,
    profiling,
    rehearsal,
    report,
    settings,
    speed,
    training,
)
from bench.common import DEVICE, GPU, TINY
from common import run_ranks
from conftest import ROOT
from loop import plan
from loop.budget import RECOMPUTED, count_parameters, flops_per_token, sent_bytes
from loop.options import Options, model_config
from model import GPTOSSConfig
from runs import Run

RATES_AT_32K = {  # TFLOP/s of an H200
    "qkv": {"forward": 796, "backward": 796},
    "out": {"forward": 796, "backward": 796},
    "unembedding": {"forward": 796, "backward": 796},
    "gate_up": {"forward": 700, "backward": 587},
    "down": {"forward": 636, "backward": 585},
    "causal": {"forward": 444, "backward": 411},
    "window": {"forward": 73.0, "backward": 64.9},  # 0.94 and 2.64 ms a layer
}


@pytest.fixture
def run(tmp_path, capsys):
    """run(arguments) -> (what it printed, the JSON that it wrote)."""

    def run(*arguments, name="bench"):
        bench.main([f"--out={tmp_path}", *arguments])
        return capsys.readouterr().out, json.loads((tmp_path / f"{name}.json").read_text())

    yield run
    torch.use_deterministic_algorithms(False)


cpu_only = pytest.mark.skipif(GPU, reason="on a GPU the sizes are the real ones")


# --------------------------------------------------------------------------------------------------
# Arithmetic


def test_floor_by_hand():
    slow = {
        name: {"forward": 1e-6, "backward": 0.5e-6} for name in RATES_AT_32K
    }  # 1 and 0.5 million FLOPs a second
    # a matmul: 2 forward at 1, 2 backward at a half: 6, the unembedding 1 forward: 5; attention: 1
    # and 2.5 at a half: 6
    expected = {
        "qkv": 1.048576 * 6,
        "out": 0.524288 * 6,
        "gate_up": 2.097152 * 6,
        "down": 1.048576 * 6,
    }
    expected |= {"unembedding": 2.097152 * 5, "causal": 0.135168 * 6, "window": 0.100352 * 6}
    assert kernels.floor(TINY, 32, slow) == pytest.approx(expected)
    once = kernels.floor(TINY, 32, slow, RECOMPUTED["none"])
    assert once == pytest.approx(
        expected | {n: expected[n] * 5 / 6 for n in ("qkv", "out", "gate_up", "down")}
    )
    attention, everything = (
        kernels.floor(TINY, 32, slow, RECOMPUTED[kind]) for kind in ("attention", "all")
    )
    assert attention == pytest.approx({**expected, "down": 1.048576 * 5, "window": 0.100352 * 7})
    assert everything == pytest.approx({**attention, "causal": 0.135168 * 7})


def test_floor_of_the_20b_at_32k():
    """Worked out by hand, in seconds; qkv and out together 0.210."""
    parts = kernels.floor(GPTOSSConfig(), 32 * 1024, RATES_AT_32K)
    expected = {
        "unembedding": 0.143,
        "gate_up": 0.654,
        "down": 0.342,
        "causal": 0.880,
        "window": 0.043,
    }
    assert {name: parts[name] for name in expected} == pytest.approx(expected, abs=0.001)
    assert sum(parts.values()) == pytest.approx(2.27, abs=0.01)


def test_best_rates_are_the_fastest_that_ran_at_the_length():
    def ceiling(name, tokens, forward, backward):
        return {"name": name, "tokens": tokens, "forward": forward, "backward": backward}

    ceilings = [
        ceiling("qkv", None, 7, 6),
        ceiling("causal", 4096, 1, 5),
        ceiling("causal", 4096, 3, 2),
        {"name": "causal", "tokens": 4096, "error": "out of memory"},
        ceiling("causal", 65536, 9, 8),
    ]
    qkv = {"forward": 7, "backward": 6}
    assert kernels.best_rates(ceilings, 4096) == {
        "qkv": qkv,
        "causal": {"forward": 3, "backward": 5},
    }
    assert kernels.best_rates(ceilings, 131072) == {
        "qkv": qkv,
        "causal": {"forward": 9, "backward": 8},
    }  # as at 64K
    assert kernels.best_rates(ceilings, 8192) == {"qkv": qkv}


def test_rows_of_tries_the_next_mode_and_keeps_to_it(monkeypatch):
    model, tried = types.SimpleNamespace(), []

    def measure_row(config, model, loss_of, S):
        tried.append((S, model.recompute))
        if (S, model.recompute) in [(64, "none"), (128, "attention")]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        if S == 256:
            raise RuntimeError("two\nlines")
        return {"seconds": 1.0}

    monkeypatch.setattr(speed, "measure_row", measure_row)
    rows = list(speed.rows_of("ours", model, TINY, [256, 32, 64, 128], "auto"))
    assert tried == [
        (32, "none"),
        (64, "none"),
        (64, "attention"),
        (128, "attention"),
        (128, "all"),
        (256, "all"),
    ]
    assert [row["recompute"] for row in rows] == ["none", "attention", "all", "all"]
    assert rows[-1]["error"] == "RuntimeError: two"
    (row,) = speed.rows_of("ours", model, TINY, [64], "none")
    assert row == {
        "model": "ours",
        "row": "64",
        "tokens": 64,
        "recompute": "none",
        "error": "out of memory",
    }


def test_rows_are_parsed():
    assert report.parse_rows("100, 16x4K,1m") == [(1, 100), (16, 4096), (1, 1024 * 1024)]
    assert [report.length(S) for S in (100, 4096, 1024 * 1024)] == ["100", "4K", "1M"]
    for wrong in "4Q", "", "0", "4K,,8K", "-1", "x4K", "0x4K":
        with pytest.raises(argparse.ArgumentTypeError, match="no list of lengths"):
            report.parse_rows(wrong)


def test_errors_of_a_group():
    truth = {
        "blocks.0.attention.sinks": torch.tensor([3.0, 0.0]),
        "blocks.1.attention.sinks": torch.tensor([0.0, 4.0]),
    }
    measured = {
        "blocks.0.attention.sinks": torch.tensor([3.0, 1.0]),
        "blocks.1.attention.sinks": torch.tensor([0.0, 4.0]),
    }
    assert accuracy.relative_errors(measured, truth) == {"sinks": pytest.approx(1 / 5)}
    names = [
        "blocks.13.attention.qkv.bias",
        "blocks.2.attention.qkv.weight",
        "blocks.0.mlp.gate_up_bias",
        "norm.weight",
    ]
    names += ["blocks.0.mlp.gate_up_weight", "blocks.0.attention_norm.weight"]
    ones = dict.fromkeys(names, torch.ones(1))
    assert list(accuracy.relative_errors(ones, ones)) == [
        "qkv",
        "gate_up",
        "norm",
        "attention_norm",
    ]


@pytest.mark.skipif(
    DEVICE.type != "cpu",
    reason="counts operations on the CPU; a GPU's kernels are counted instead",
)
def test_the_backward_belongs_to_the_part_of_its_forward():
    x, w, v = (torch.randn(512, 512, requires_grad=True) for _ in range(3))

    def step():
        experts = profiling.labelled(profiling.EXPERTS, torch.mm)
        y = profiling.labelled(profiling.REST, lambda: experts(x, w).tanh())()
        profiling.labelled(profiling.LOSS, torch.mm)(y, v).sum().backward()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    parts, kernels = profiling.time_by_part(profiler.events())
    (matmuls,) = (ms for name, ms, count in kernels if name == "aten::mm" and count == 6)
    assert parts[profiling.EXPERTS] + parts[profiling.LOSS] >= matmuls
    assert (
        min(parts[profiling.EXPERTS], parts[profiling.LOSS]) > matmuls / 4
    )  # half of the matmuls each
    assert sum(parts.values()) == pytest.approx(sum(ms for _, ms, _ in kernels))


# --------------------------------------------------------------------------------------------------
# Commands


def test_rows_floor_and_plot(run, tmp_path):
    pytest.importorskip("transformers", reason="the rows are compared with transformers")
    printed, results = run("--against=transformers", "--rows=96,48", "--layers=3")
    assert "a tiny model of 3 layers" in printed and results["layers"] == 3
    assert {c["name"] for c in results["ceilings"]} == {"matmul", *RATES_AT_32K}
    assert all(c["forward"] > 0 and c["backward"] > 0 for c in results["ceilings"])
    assert [(row["model"], row["tokens"]) for row in results["rows"]] == [
        ("ours", 48),
        ("ours", 96),
        ("transformers", 48),
        ("transformers", 96),
    ]
    config = replace(TINY, num_hidden_layers=3)
    for row in results["rows"]:
        assert "error" not in row, row["error"]
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["tflops"] == pytest.approx(
            flops_per_token(config, row["tokens"]) * row["tokens_per_second"] / 1e12
        )
        rates = kernels.best_rates(results["ceilings"], row["tokens"])
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / rates["matmul"]["forward"])
        if row["model"] == "ours":
            assert row["recompute"] == "none" and row["floor"] == pytest.approx(
                kernels.floor(config, row["tokens"], rates)
            )
            assert (
                row["distance"] == pytest.approx(row["seconds"] / sum(row["floor"].values()))
                and row["distance"] > 0.5
            )
            assert row["own_distance"] > row["distance"], "nothing is recomputed"
    for ours, theirs in zip(results["rows"][:2], results["rows"][2:]):
        assert theirs["ours_faster"] == pytest.approx(theirs["seconds"] / ours["seconds"])
        assert f"{theirs['ours_faster']:.2f}\n" in printed

    pytest.importorskip("matplotlib", reason="the plot is drawn by matplotlib")
    bench.main([f"--out={tmp_path}", f"--plot={tmp_path / 'new' / 'bench.png'}"])
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_training_on_two_ranks(tmp_path):
    arguments = f"--out={tmp_path}", "--rows=4x32,64", "--layers=1"
    printed = Run(tmp_path, *arguments, ranks=2, program="bench.__main__").ends_well().text()
    results = json.loads((tmp_path / "train.json").read_text())
    several, one = results["rows"]
    assert (several["row"], several["sp"], several["tokens"]) == ("4 x 32", 1, 128)
    assert (one["row"], one["sp"], one["tokens"]) == ("1 x 64", 2, 64)
    assert printed.count("4 x 32") == 1, "the first rank alone prints"
    config = replace(TINY, num_hidden_layers=1)
    for row in several, one:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / 2 / row["seconds"])
        assert row["tflops"] == pytest.approx(
            flops_per_token(config, row["sequence"]) * row["tokens_per_second"] / 1e12
        )
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] / results["matmul"])
        assert 0 < row["optimizer_seconds"] < row["seconds"]
        found = row["recompute"], row["keep_blocks"], row["offload"]
        assert found == ("none", 0, False), "there is room for all"


SETTINGS = {"parameters": 20_914_757_184, "ranks": 8, "sp": 1, "replicas": 1, "seq_len": 32768}
SETTINGS |= {"micro_batch": 1, "micro_batches": 1}


def groups_of_rows():
    """The ranks that share a sequence in rows of sp 2, 4 and 2, and how many groups there are."""
    groups = [training.sharing(n).get_group() for n in (2, 4, 2)]
    return [*map(dist.get_process_group_ranks, groups), len(dist.distributed_c10d._world.pg_map)]


def test_rows_make_no_more_groups_than_they_need():
    for rank, found in enumerate(run_ranks(4, groups_of_rows)):
        pair = [rank - rank % 2, rank - rank % 2 + 1]
        assert found == [pair, [0, 1, 2, 3], pair, 2]


def fitting(gib, monkeypatch, recompute="auto", keep_blocks=None, optimizer=None, gpu_gib=None):
    """On a GPU of `gib` GiB: (optimizer, recompute, kept blocks, offload)."""
    monkeypatch.setattr(settings, "GPU", True)
    properties = types.SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    given = {"recompute": recompute, "keep_blocks": keep_blocks, "optimizer": optimizer}
    options = types.SimpleNamespace(**given, gpu_gib=gpu_gib)
    run = SETTINGS | {"gpu_gib": settings.card(options)}
    found = settings.fitting(options, GPTOSSConfig(), run, ("fp32", "split"))
    return tuple(found.values())


def test_settings_are_the_fastest_that_fit(monkeypatch):
    """The larger the GPU the less is recomputed, and no block more fits; too small a GPU gets the
    settings that need least."""
    assert fitting(500, monkeypatch) == ("fp32", "none", 0, False)
    kept = []
    for gib in (75, 80, 90):
        optimizer, recompute, blocks, offload = fitting(gib, monkeypatch)
        assert (recompute, offload) == ("attention", False)
        run = SETTINGS | {"optimizer": optimizer, "recompute": recompute, "offload": offload}
        of, more = (
            plan.peak(GPTOSSConfig(), run | {"keep_blocks": n}) for n in (blocks, blocks + 1)
        )
        assert of <= plan.room(gib, 8) < more
        kept.append(blocks)
    assert 0 <= kept[0] < kept[1] < kept[2] < 24
    assert fitting(10, monkeypatch)[:2] == ("split", "all")


def test_settings_fit_the_smaller_of_the_gpu_and_gpu_gib(monkeypatch):
    small, large = fitting(80, monkeypatch), fitting(141, monkeypatch)
    assert small != large
    assert fitting(141, monkeypatch, gpu_gib=80) == fitting(80, monkeypatch, gpu_gib=141) == small


def test_settings_that_are_given_stay(monkeypatch):
    """Also where they do not fit, and where the search would not try them."""
    assert fitting(500, monkeypatch, optimizer="split")[0] == "split"
    assert fitting(10, monkeypatch, "none") == ("split", "none", 0, False)
    assert fitting(10, monkeypatch, "attention", 2)[1:] == ("attention", 2, False)
    assert fitting(500, monkeypatch, keep_blocks=3)[1:] == ("attention", 3, False)
    assert fitting(500, monkeypatch, "none", 7, "split") == ("split", "none", 7, False)


@cpu_only
def test_training_ends_when_a_rank_is_out_of_memory(tmp_path, monkeypatch, capsys):
    """One rank, two rows of the table, of which the first does not fit."""

    def leave(code):
        raise SystemExit(code)

    def training_step(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": 0,
        "LOCAL_RANK": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(training, "training_step", training_step)
    try:
        with pytest.raises(SystemExit):
            bench.main([f"--out={tmp_path}", "--rows=3x32,64", "--layers=1"])
    finally:
        dist.destroy_process_group()
    assert "3 x 32: out of memory on rank 0" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "train.json").read_text())["rows"]
    assert row["error"] == "out of memory" and row["tokens"] == 96


@pytest.mark.parametrize(
    "communication, computation, alone",
    [
        ([(0, 10)], [], 10),
        ([(0, 10)], [(2, 4), (3, 5)], 7),
        ([(0, 4), (2, 6)], [(5, 9)], 5),  # two at once count once
        ([(0, 2), (2, 3)], [(0, 3)], 0),
        ([], [(0, 3)], 0),
    ],
)
def test_exposed_communication(communication, computation, alone):
    assert training.exposed(communication, computation) == alone


def test_profile(run, tmp_path):
    printed, results = run("--profile", "--rows=64", "--recompute=all", name="profile")
    parts = results["parts_ms"]
    assert parts.keys() == {
        profiling.ATTENTION,
        profiling.PROJECTIONS,
        profiling.EXPERTS,
        profiling.LOSS,
        profiling.REST,
    }
    assert all(ms > 0 for ms in parts.values()) and len(results["kernels"]) == 20
    assert results["rows"][0]["recompute"] == "all" and "attention" in printed
    assert (tmp_path / "trace.json.gz").read_bytes().startswith(b"\x1f\x8b")


def test_deterministic(run):
    printed, results = run("--deterministic=true", "--rows=64", name="deterministic")
    normal, exact = results["rows"]
    assert (normal["deterministic"], exact["deterministic"]) == (False, True)
    assert results["different"] == [] and "equal to the bit" in printed
    assert results["cost"] == pytest.approx(exact["seconds"] / normal["seconds"] - 1)


@cpu_only
def test_deterministic_sees_a_difference(run, monkeypatch):
    seeds = iter(range(100))

    def tokens(config, S):
        generator = torch.Generator().manual_seed(next(seeds))
        return torch.randint(512, (1, S), generator=generator)

    monkeypatch.setattr(determinism, "random_tokens", tokens)
    _, results = run("--deterministic=true", "--rows=16", name="deterministic")
    assert {"loss", "embedding.weight", "blocks.1.attention.sinks"} <= set(results["different"])


@cpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_accuracy(dtype, run, monkeypatch):
    """In fp32 both errors vanish: weights are copied right, gradients renamed right, losses
    equal."""
    pytest.importorskip("transformers", reason="the errors are compared with transformers'")
    monkeypatch.setattr(accuracy, "DTYPE", dtype)
    printed, results = run("--accuracy", name="accuracy")
    ours, theirs = results["errors"]["ours"], results["errors"]["transformers"]
    assert (
        ours.keys() == theirs.keys()
        and {"logits", "embedding", "qkv", "sinks", "router", "gate_up"} <= ours.keys()
    )
    if dtype == torch.float32:
        assert max(*ours.values(), *theirs.values()) < 1e-5, (ours, theirs)
    else:
        assert all(1e-4 < error < 0.3 for error in (*ours.values(), *theirs.values())), (
            ours,
            theirs,
        )
        worst = max(error / theirs[name] for name, error in ours.items())
        assert f"Largest ratio {worst:.2f}" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows=4Q"], "'4Q' is no list of lengths"),
        (["--layers=0"], "num_hidden_layers=0 must be a positive int"),
        (["--accuracy", "--against=transformers"], "--accuracy is compared with nothing"),
        (["--rehearse=2", "--against=transformers"], "--rehearse is compared with --against=ranks"),
        (["--accuracy", "--rows=1"], "at least 2 tokens"),
        (["--rows=2x4K"], "start it by torchrun"),
        (["--documents=512,all"], "'512,all' is no list such as 512,4096,mix"),
        (["--rehearse=2", "--gpu_gib=-1"], "--gpu_gib=-1 must be positive, and finite"),
        (["--gpu_gib=80"], "--gpu_gib=80 limits a rehearsal: give --rehearse=8 too"),
        (["--rehearse=0"], "'0' is no number of ranks: 1 or more"),
        (
            ["--profile", "--accuracy"],
            "--profile is for a plain step, or for --rehearse",
        ),
        (["--profile", "--deterministic=true"], "--profile is for a plain step"),
        (["--profile", "--plot"], "--profile is for a plain step"),
        (["--accuracy", "--ablation"], "not allowed with"),
        (["--plot", "--out=nowhere"], "nowhere/bench.json does not exist: run `python -m bench`"),
    ],
)
def test_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert message in capsys.readouterr().err + str(stop.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rows=33"], "1x33 at sp=2: sp must divide"),
        (["--rows=3x32"], "must divide among 2 groups"),
        (["--sp=-1"], "at sp=-1"),
        (["--keep_blocks=-1"], "--keep_blocks=-1: 0 or more"),
    ],
)
def test_wrong_options_under_torchrun(arguments, message, monkeypatch, capsys):
    """Said by the first rank alone, before they meet."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "0", "1":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            bench.main(arguments)
        assert stop.value.code == 2 and (message in capsys.readouterr().err) == (rank == "0")


# --------------------------------------------------------------------------------------------------
# Packed documents


@pytest.mark.parametrize("kind", [8, 100, "mix"])
@pytest.mark.parametrize("S", [4096, 4097])
def test_documents_fill_a_sequence(kind, S):
    """Of each typical length as many tokens as its share, and no document far from it."""
    shares, found = documents.shares(kind, S), documents.lengths(kind, S)
    assert sum(shares.values()) == pytest.approx(1) and sum(found) == S and min(found) > 0
    assert documents.lengths(kind, S) == found, "drawn from a named distribution, not anew"
    assert sorted(found) != found, "in no order"
    for typical, share in shares.items():
        near = [x for x in found if 0.8 * typical - 1 <= x <= 1.25 * typical + 1]
        assert sum(near) == pytest.approx(share * S, abs=len(found))
    if kind == "mix":
        assert max(found) == pytest.approx(S / 2, rel=0.11)
        assert sum(x for x in found if x < S / 4) == pytest.approx(S / 2, rel=0.1)
    assert documents.numbers([3, 2]).tolist() == [0, 0, 0, 1, 1]


@cpu_only
def test_packed_documents_beside_plain_sequences(run):
    printed, results = run("--documents=8,mix", "--rows=2x64", "--layers=1", name="documents")
    rows = {(row["documents"], row["row"]): row for row in results["rows"]}
    plain = [("none", f"{n} x {S}") for n, S in ((2, 64), (32, 4), (16, 8), (8, 16), (4, 32))]
    assert set(rows) == {*plain, ("octaves of 8", "2 x 64"), ("mix", "2 x 64")}
    assert all("error" not in row for row in rows.values())
    apart = sum(share * rows[key]["seconds"] for share, key in zip((0.25, 0.25, 0.5), plain[1:4]))
    slower = rows["octaves of 8", "2 x 64"]["seconds"] / apart - 1
    assert rows["octaves of 8", "2 x 64"]["slower"] == pytest.approx(slower)
    apart = (rows["none", "4 x 32"]["seconds"] + rows["none", "8 x 16"]["seconds"]) / 2
    assert rows["mix", "2 x 64"]["slower"] == pytest.approx(
        rows["mix", "2 x 64"]["seconds"] / apart - 1
    )
    config, mix = replace(TINY, num_hidden_layers=1), documents.lengths("mix", 64)
    flops = 2 * sum(n * flops_per_token(config, n) for n in mix)
    found = rows["mix", "2 x 64"]
    assert found["tflops"] == pytest.approx(flops / found["seconds"] / 1e12)


@pytest.mark.slow
def test_packed_documents_on_two_ranks(tmp_path):
    """Whole training steps, the packed sequence shared by both ranks."""
    arguments = [f"--out={tmp_path}", "--documents=mix", "--rows=64", "--layers=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "bench"]
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "documents.json").read_text())["rows"]
    assert [(row["documents"], row["row"], row["sp"]) for row in rows] == [
        ("none", "1 x 64", 2),
        ("none", "2 x 32", 1),
        ("none", "4 x 16", 1),
        ("mix", "1 x 64", 2),
    ]
    assert len({(row["recompute"], row["keep_blocks"]) for row in rows}) == 1
    assert done.stdout.count("mix") == 1, "the first rank alone prints"


# --------------------------------------------------------------------------------------------------
# One rank of many


def test_usual_rows_of_a_rehearsal(monkeypatch):
    """On eight GPUs 4K to 32K without sequence parallelism, then with it; at 256K all share one."""
    monkeypatch.setattr(rehearsal, "GPU", True)
    rows = [f"{n}x{report.length(S)}" for n, S in rehearsal.usual_rows(8)]
    assert ",".join(rows) == "64x4K,16x16K,8x32K,4x64K,2x128K,1x256K,1x512K,1x1M"
    assert rehearsal.usual_rows(16)[-2:] == [(1, 512 * 1024), (1, 1024 * 1024)]


@cpu_only
@pytest.mark.slow
def test_rehearsal_beside_real_ranks(run, tmp_path, monkeypatch):
    """A row as one of two ranks and over gloo; a row of the table has the numbers of both."""
    monkeypatch.chdir(tmp_path)
    arguments = "--rehearse=2", "--against=ranks", "--rows=4x32", "--layers=1"
    printed, results = run(*arguments, name="rehearse")
    (row,) = results["rows"]
    assert "error" not in row and (row["row"], row["sp"], row["recompute"]) == ("4 x 32", 1, "none")
    assert row["communication"] == pytest.approx(row["real_seconds"] / row["seconds"] - 1)
    assert row["tokens_per_second"] == pytest.approx(4 * 32 / 2 / row["seconds"])
    assert row["sent_bytes"]["all_gather"] > 0 and row["sent_bytes"]["all_to_all"] == 0
    assert "real: s" in printed and "4 x 32" in printed
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["bench-rehearsal"]


@cpu_only
def test_profile_of_a_rehearsed_step(run, tmp_path, monkeypatch):
    """Parts of the model and of training, and the bytes of those that only copy."""
    monkeypatch.chdir(tmp_path)
    arguments = "--rehearse=4", "--profile", "--rows=8x32", "--layers=1", "--optimizer=split"
    printed, results = run(*arguments, name="rehearse")
    assert "tokens: random\n" in printed
    (row,) = results["rows"]
    parts = {profiling.GATHER, profiling.PLACE, profiling.REDUCE, profiling.CLIP}
    parts |= {profiling.OPTIMIZER, profiling.EXPERTS, profiling.ATTENTION, profiling.LOSS}
    assert row["parts_ms"].keys() == parts | {profiling.PROJECTIONS, profiling.REST}
    assert all(ms > 0 for ms in row["parts_ms"].values())
    counted = [part.removeprefix(profiling.PART) for part in parts if f"{part[6:]}: " in printed]
    assert len(counted) == 4, "with their bytes: GATHER, PLACE, REDUCE, OPTIMIZER"
    assert not torch.autograd._profiler_enabled()
    assert (tmp_path / "trace-8x32.json.gz").read_bytes().startswith(b"\x1f\x8b")


def test_bytes_that_a_step_moves():
    sizes = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_experts"), 8)
    row = Options(ranks=8, batch_size=16, micro_batch=1, optimizer="split", **sizes)
    parameters = count_parameters(model_config(row))
    sent = sent_bytes(model_config(row), **plan.settings_of(row, model_config(row), 8))
    moved = rehearsal.moved(row, {"sent_bytes": sent})
    # two micro-batches; bf16: into one buffer, out to the others, and read again to be added up
    written = 2 * parameters * (1 + 1 + 2 + 1 + 1 / 8) * 2
    assert moved[profiling.REDUCE] == pytest.approx(written)
    assert moved[profiling.OPTIMIZER] == parameters * (2 * 2 + 2 + 2 * 6) / 8
    assert moved[profiling.PLACE] == pytest.approx(2 * sent["all_gather"] * 8 / 7)
    # in fp32: cast on the way into one buffer, which PyTorch exchanges and adds up itself
    moved = rehearsal.moved(replace(row, optimizer="fp32"), {"sent_bytes": sent})
    assert moved[profiling.REDUCE] == pytest.approx(2 * parameters * (2 + 4 + 4 + 4 / 8))
    assert moved[profiling.OPTIMIZER] == parameters * (2 * 4 + 4 + 2 * 8) / 8


def test_a_profiled_step_that_fails(monkeypatch):
    monkeypatch.setattr(profiling.Log, "begin", lambda log: None)
    with pytest.raises(ValueError, match="boom"), profiling.profiled_step(train, 1):
        profiling.Log.begin(None)
        assert torch.autograd._profiler_enabled()
        raise ValueError("boom")
    assert not torch.autograd._profiler_enabled()


@cpu_only
def test_rehearsal_goes_on_after_a_row_that_fails(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    original, failures = rehearsal.rehearse, iter([ValueError("rehearsal: out of memory: try")])

    limits = []  # that train.py gets

    def rehearse(row, train):
        if failure := next(failures, None):
            raise failure

        def train_and_see(options):
            limits.append(options.gpu_gib)
            return train(options)

        return original(row, train_and_see)

    monkeypatch.setattr(rehearsal, "rehearse", rehearse)
    arguments = "--rehearse=2", "--rows=2x32,32", "--layers=1", "--gpu_gib=0.001"
    printed, results = run(*arguments, name="rehearse")
    rows = results["rows"]
    assert [row.get("error") for row in rows] == ["out of memory", None] and limits == [0.001]
    assert [row["optimizer"] for row in rows] == ["split", "split"], "too little for fp32"
    assert "in 0.001 GiB" in printed
