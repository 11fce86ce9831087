"""Adapters in train.py: on ranks as on one, resumed, and saved beside their base."""

import dataclasses
import json

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import lora
import sp
from common import assert_all_close, batch, noise_, relative, run_ranks, tiny_config
from conftest import ROOT
from loop.options import Options, parse
from loop.plan import dry_run, needs, peak, settings_of
from model import GPTOSS, IGNORED, GPTOSSConfig
from runs import Run, losses, make_home, train
from test_lora import noisy_adapters, packed_model, step
from train import build_model, build_optimizer
from weights import save_weights

SIZES = tiny_config(
    num_hidden_layers=2,
    vocab_size=257,
    hidden_size=32,
    intermediate_size=64,
    num_experts=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=64,
)
LORA = ["--checkpoint=base", "--lora_rank=3", "--lora_targets=all", "--frozen=mxfp4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where runs are: a corpus, and a packed checkpoint in fp32 with a copy in bf16."""
    home = make_home(tmp_path_factory.mktemp("home"))
    save_weights(packed_model(SIZES, torch.float32), home / "base", None, SIZES.to_json)
    noise_(GPTOSS(SIZES)).save_checkpoint(home / "unpacked")
    config = (home / "tiny.py").read_text().splitlines()
    config = [line for line in config if not any(
        line.startswith(size) for size in dataclasses.asdict(SIZES))]  # fmt: skip
    (home / "adapters.py").write_text("\n".join(config))
    return home


# --------------------------------------------------------------------------------------------------
# Gradients on ranks


CASES = {  # ranks: [options]
    2: [
        {"sp": 2, "frozen": "mxfp4"},
        {"sp": 1, "frozen": "mxfp4", "shard_frozen": True, "recompute": "none"},
        {"sp": 2, "recompute": "attention", "lora_layers": "1"},
    ],
    4: [{"sp": 4, "frozen": "mxfp4"}, {"sp": 2, "frozen": "mxfp4", "shard_frozen": True}],
}


def on_ranks(cases, folder):
    """[(loss and gradients on these ranks, the same on one)] for each case."""
    ranks, rank, device, found = dist.get_world_size(), dist.get_rank(), torch.device("cpu"), []
    tokens, targets = batch(SIZES, 4, 24)
    targets[:, :8] = IGNORED  # so that the ranks' counts differ
    documents = (torch.arange(24) >= torch.arange(4)[:, None] + 8).int()
    for told in cases:
        options = Options(
            **dataclasses.asdict(SIZES),
            batch_size=ranks,
            checkpoint=folder,
            lora_rank=3,
            lora_targets="all",
            **told,
        )
        sp.init(None)
        alone = lora.from_checkpoint(folder, dtype=torch.float32)
        noisy_adapters(
            lora.adapt(alone, 3, 32.0, "all", told.get("lora_layers", ""), torch.float32)
        )
        expected = step(alone, (tokens, targets, documents))
        shape = ranks // options.sp, options.sp
        sp.init(init_device_mesh("cpu", shape, mesh_dim_names=("batch", "sp"))["sp"])
        mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))
        model = build_model(options, SIZES, device, mesh, torch.float32)
        noisy_sharded(model)
        each = 4 * options.sp // ranks
        mine = slice(rank // options.sp * each, (rank // options.sp + 1) * each)
        share = model(*sp.shard(*(x[mine] for x in (tokens, targets, documents))),
                      count=(targets != IGNORED).sum())  # fmt: skip
        share.backward()
        loss = share.detach()
        dist.all_reduce(loss)
        assert not any(p.grad is not None for p in lora.base(model).values())
        gradients = {name: p.grad.full_tensor() for name, p in lora.adapters(model).items()}
        kinds = {name: type(p).__name__ for name, p in lora.base(model).items()}
        assert set(kinds.values()) == {"DTensor" if options.shard_frozen else "Parameter"}
        found.append(({"loss": loss, **gradients}, expected))
    return found


def noisy_sharded(model):
    """As noisy_adapters, on every rank its shard."""
    for number, parameter in enumerate(lora.adapters(model).values()):
        generator = torch.Generator().manual_seed(7000 + number)
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            lora.copy_rows(parameter, noise / parameter.shape[1] ** 0.5 / 2)


@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_of_adapters_are_those_of_one_rank(ranks, home):
    for found, expected in run_ranks(ranks, on_ranks, CASES[ranks], str(home / "base"))[0]:
        assert_all_close(found, expected, 1e-5)


# --------------------------------------------------------------------------------------------------
# Runs


def adapted(home, name):
    """The adapters in runs/NAME/model."""
    return {n: p[:] for n, p in lora.open_adapters(home / "runs" / name / "model").items()}


def test_a_run_of_adapters(home, monkeypatch):
    """Only adapters change, are saved, and are what an optimizer and a state hold; a run that goes
    on on another number of ranks makes the same."""
    monkeypatch.chdir(home)
    told = ["adapters.py", *LORA, "--steps=6", "--save_every=3", "--lr=1e-2"]
    said = train(home, *told, "--name=whole")
    assert "adapters of rank 3 on all, frozen weights 0.0 GiB on each rank, experts packed" in said
    assert "adapters are in runs/whole/model" in said
    for ranks, more in ((2, ["--sp=2"]), (2, ["--shard_frozen=true"])):
        name = f"on{ranks}{more[0][2:4]}"
        train(home, *told, "--steps=3", f"--name={name}", *more, ranks=ranks)
        train(home, *told, "--resume=true", f"--name={name}")
        assert (
            relative(torch.tensor(losses(home, name)), torch.tensor(losses(home, "whole"))) < 1e-5
        )
    whole = adapted(home, "whole")
    start = lora.adapt(lora.from_checkpoint("base"), 3, 32.0, "all", dtype=torch.float32)
    start = {name: p.detach() for name, p in lora.adapters(start).items()}
    assert whole.keys() == start.keys()
    assert all(relative(whole[name], start[name]) > 1e-3 for name in whole)
    state = sorted((home / "runs" / "whole" / "states").iterdir())[-1]
    kept = {name for path in state.glob("*.safetensors") for name in lora.read_header(path)}
    assert kept == {f"{kind}{name}" for name in whole for kind in ("", "exp_avg.", "exp_avg_sq.")}
    model = lora.from_checkpoint("runs/whole/model", dtype=torch.float32)
    tokens, _ = batch(SIZES, 1, 9)
    assert relative(model(tokens), lora.from_checkpoint("base", dtype=torch.float32)(tokens)) > 1e-3


@pytest.mark.slow
def test_a_resumed_run_repeats_the_last_digit(home):
    told = ["adapters.py", *LORA, "--steps=6", "--save_every=3", "--lr=1e-2", "--name=digits"]
    train(home, *told, "--steps=3")
    train(home, *told, "--resume=true")
    train(home, *told[:-1], "--name=undisturbed")
    assert losses(home, "digits") == losses(home, "undisturbed")
    first, second = adapted(home, "digits"), adapted(home, "undisturbed")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_packed_and_unpacked_train_alike(home):
    told = ["adapters.py", *LORA, "--steps=3", "--lr=1e-2"]
    train(home, *told, "--name=packed")
    train(home, *told, "--frozen=bf16", "--name=unpacked")
    packed, unpacked = (torch.tensor(losses(home, name)) for name in ("packed", "unpacked"))
    assert relative(packed, unpacked) < 1e-6


@pytest.mark.parametrize("told, message", [
    (["--frozen=mxfp4"], "frozen=mxfp4 is for adapters: set --lora_rank too"),
    (["--shard_frozen=true"], "shard_frozen=True is for adapters: set --lora_rank too"),
    (["--lora_rank=4"], "lora_rank=4: adapters are kept apart from the weights that they adapt"),
    (["--lora_rank=-1", "--checkpoint=base"], "lora_rank=-1 must be zero or positive"),
    (["--lora_rank=33", "--checkpoint=base"], "lora_rank=33: qkv is a matrix 32 x"),
    (["--lora_rank=4", "--checkpoint=base", "--lora_targets=mlp"], "'mlp' is none of"),
    (["--lora_rank=4", "--checkpoint=base", "--frozen=fp8"], "choose one of bf16, mxfp4"),
    (["--lora_rank=4", "--checkpoint=unpacked", "--frozen=mxfp4"],
     "frozen=mxfp4: unpacked holds unpacked experts"),
])  # fmt: skip
def test_bad_input(home, told, message):
    run = Run(home, "adapters.py", *told, "--name=bad")
    assert run.wait() == [1] and message in run.text() and "Traceback" not in run.text()
    assert not (home / "runs" / "bad").exists()


@pytest.mark.slow
def test_adapters_of_another_base_are_not_resumed(home, tmp_path):
    told = ["adapters.py", *LORA, "--steps=2", "--save_every=1", "--name=other"]
    train(home, *told)
    for change in ["--lora_rank=4"], ["--lora_alpha=8"], ["--lora_targets=qkv"]:
        run = Run(home, *told, "--steps=3", "--resume=true", *change)
        assert run.wait() == [1] and change[0][2:11] in run.text()
    model = packed_model(SIZES, torch.float32)
    model.norm.weight.data[0] += 1
    save_weights(model, tmp_path / "base", None, SIZES.to_json)
    other = [f"--checkpoint={tmp_path / 'base'}" if x == "--checkpoint=base" else x for x in told]
    run = Run(home, *other, "--steps=3", "--resume=true")
    assert run.wait() == [1] and "identity was" in run.text()


def test_weight_decay_is_for_adapters_too():
    options = Options(**dataclasses.asdict(SIZES), checkpoint="base", lora_rank=2, weight_decay=0.1)
    model = lora.adapt(GPTOSS(SIZES), 2)
    groups = build_optimizer(options, model).param_groups
    assert len(groups[0]["params"]) == len(lora.adapters(model)) and not groups[1]["params"]


def test_a_saved_run_names_its_base(home):
    train(home, "adapters.py", *LORA, "--steps=1", "--name=named")
    settings = json.loads((home / "runs" / "named" / "model" / "adapters.json").read_text())
    assert settings["base"] == "base" and settings["identity"] == lora.identity(home / "base")


# --------------------------------------------------------------------------------------------------
# The dry run


MEASURED = [  # GiB at the peak on an H100, `python -m bench --adapters` of 2026-11-25
    (15.34, ["--seq_len=4096"]),
    (18.25, ["--seq_len=16384"]),
    (18.98, ["--seq_len=16384", "--lora_targets=attention,experts"]),
    (46.83, ["--seq_len=32768", "--lora_targets=attention,experts", "--recompute=attention",
             "--keep_blocks=8", "--gpu_gib=80"]),
]  # fmt: skip


@pytest.mark.parametrize("measured, told", MEASURED)
def test_the_dry_run_beside_measured_peaks(measured, told):
    """Within 2.5 %. On the experts the bench's adapters have rank 8, on attention 16, which is
    worth 0.1 GiB."""
    rank = 8 if "experts" in str(told) else 16
    dry = [str(ROOT / "configs/gptoss_lora.py"), "--dry_run", "--checkpoint=", "--gpu_gib=23.5"]
    options = parse([*dry, f"--lora_rank={rank}", "--optimizer=split", *told], "")
    settings = settings_of(options, GPTOSSConfig(), 1)
    assert abs(peak(GPTOSSConfig(), settings) / 2**30 / measured - 1) < 0.025
    assert settings["parameters"] < 1e8


def test_a_dry_run_of_adapters(capsys):
    options = parse([str(ROOT / "configs/gptoss_lora.py"), "--dry_run", "--gpu_gib=24"], "")
    dry_run(options)
    said = capsys.readouterr().out
    assert "12.8 GiB  frozen weights" in said and "fits a GPU of 24 GiB" in said
    with pytest.raises(ValueError, match="'mlp' is none of"):
        dry_run(dataclasses.replace(options, lora_targets="mlp"))


def test_a_dry_run_knows_the_frozen_bytes():
    """Of whole and of shared weights, and the embedding in host memory."""
    options = parse([str(ROOT / "configs/gptoss_lora.py"), "--dry_run", "--checkpoint=",
                     "--batch_size=4", "--ranks=4"], "")  # fmt: skip
    config, embedding = GPTOSSConfig(), 2 * 201088 * 2880
    held = {}
    for name, more in (
        ("whole", {}),
        ("shared", {"shard_frozen": True}),
        ("host", {"offload": True}),
    ):
        settings = settings_of(dataclasses.replace(options, **more), config, 4)
        held[name] = needs(config, settings)["frozen weights"]
    with torch.device("meta"):
        model = lora.adapt_as(options, GPTOSS(config).bfloat16(), None)
    assert held["whole"] == sum(p.nbytes for p in lora.base(model).values())
    assert held["shared"] == held["whole"] // 4
    assert held["host"] == held["whole"] - embedding
