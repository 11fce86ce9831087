"""Adapters in train.py: on ranks as on one, resumed, and saved beside their base."""

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
from torch.distributed.device_mesh import init_device_mesh

import data
import flash
import lora
import sample
import sp
import train as train_module
from common import assert_all_close, batch, noise_, relative, run_ranks, tiny_config
from conftest import ROOT
from loop import budget
from loop.budget import sent_bytes
from loop.checks import check_run
from loop.options import Options, model_config, parse
from loop.plan import dry_run, needs, peak, settings_of, verdict
from loop.rehearse import rehearse
from lora_models import EVERYTHING, noisy_adapters, packed_model, step
from model import GPTOSS, IGNORED, GPTOSSConfig
from runs import Run, held_out, losses, make_home, train
from snapshots import load_state, state_places
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
LORA = ["--checkpoint=base", "--lora_rank=3", f"--lora_targets={EVERYTHING}", "--frozen=mxfp4"]
SIX_STEPS = ["adapters.py", *LORA, "--steps=6", "--save_every=3", "--lr=1e-2", "--warmup_steps=5"]


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
            lora_targets=EVERYTHING,
            **told,
        )
        sp.init(None)
        alone = lora.from_checkpoint(folder, dtype=torch.float32)
        noisy_adapters(
            lora.adapt(alone, 3, 32.0, EVERYTHING, told.get("lora_layers", ""), torch.float32)
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


def goes_on_elsewhere(home, name, *more):
    """Three steps on two ranks and three on one make the losses of the run "whole"."""
    train(home, *SIX_STEPS, "--steps=3", f"--name={name}", *more, ranks=2)
    text = train(home, *SIX_STEPS, "--resume=true", f"--name={name}")
    assert "goes on after step 2\n" in text
    found, expected = (torch.tensor(losses(home, which)) for which in (name, "whole"))
    assert relative(found, expected) < 1e-5


@pytest.fixture(scope="module")
def whole(home):
    """What a run of six steps on one rank says."""
    return train(home, *SIX_STEPS, "--name=whole")


def test_a_run_of_adapters(home, whole, monkeypatch):
    """Only adapters change, are saved beside the name of their base, and are what an optimizer and
    a state hold; a run that goes on on another number of ranks makes the same."""
    monkeypatch.chdir(home)
    said = (
        f"adapters of rank 3 on {EVERYTHING}, frozen weights 0.0 GiB on each rank, experts packed"
    )
    assert said in whole
    assert "adapters are in runs/whole/model" in whole
    goes_on_elsewhere(home, "shared", "--sp=2", "--shard_frozen=true")
    trained = adapted(home, "whole")
    start = lora.adapt(lora.from_checkpoint("base"), 3, 32.0, EVERYTHING, dtype=torch.float32)
    start = {name: p.detach() for name, p in lora.adapters(start).items()}
    assert trained.keys() == start.keys()
    assert all(relative(trained[name], start[name]) > 1e-3 for name in trained)
    state = sorted((home / "runs" / "whole" / "states").iterdir())[-1]
    kept = {name for path in state.glob("*.safetensors") for name in lora.read_header(path)}
    assert kept == {f"{kind}{name}" for name in start for kind in ("", "exp_avg.", "exp_avg_sq.")}
    model = lora.from_checkpoint("runs/whole/model", dtype=torch.float32)
    tokens, _ = batch(SIZES, 1, 9)
    assert relative(model(tokens), lora.from_checkpoint("base", dtype=torch.float32)(tokens)) > 1e-3
    assert torch.equal(load_state(state)(tokens), model(tokens))
    for name, place in lora.places("runs/whole/model")[0].items():
        assert torch.equal(state_places(state)[0][name][:], place[:]), name
    settings = json.loads((home / "runs/whole/model/adapters.json").read_text())
    assert settings["base"] == "base" and settings["identity"] == lora.identity("base")


@pytest.mark.slow
@pytest.mark.parametrize("more", ["--sp=2", "--sp=1"])
def test_a_run_goes_on_with_whole_copies(home, whole, more):
    goes_on_elsewhere(home, f"copies{more[-1]}", more)


@pytest.mark.slow
def test_a_resumed_run_repeats_the_last_digit(home, whole):
    train(home, *SIX_STEPS, "--steps=3", "--name=digits")
    text = train(home, *SIX_STEPS, "--resume=true", "--name=digits")
    assert "goes on after step 2\n" in text
    assert losses(home, "digits") == losses(home, "whole")
    first, second = adapted(home, "digits"), adapted(home, "whole")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
def test_packed_and_unpacked_train_alike(home):
    told = ["adapters.py", *LORA, "--steps=3", "--lr=1e-2", "--warmup_steps=5"]
    train(home, *told, "--name=packed")
    train(home, *told, "--frozen=bf16", "--name=unpacked")
    packed, unpacked = (torch.tensor(losses(home, name)) for name in ("packed", "unpacked"))
    assert relative(packed, unpacked) < 1e-6


@pytest.mark.parametrize("told, message", [
    (["--frozen=mxfp4"], "frozen=mxfp4 is for adapters: set --lora_rank too"),
    (["--shard_frozen=true"], "shard_frozen=True is for adapters: set --lora_rank too"),
    (["--lora_rank=4", "--lora_alpha=0", "--checkpoint=base"], "lora_alpha=0.0 must be positive"),
    (["--lora_rank=4", "--lora_layers=2", "--checkpoint=base"], "the model has layers 0 to 1"),
    (["--lora_rank=4"], "lora_rank=4: adapters are kept apart from the weights that they adapt"),
    (["--lora_rank=-1", "--checkpoint=base"], "lora_rank=-1 must be zero or positive"),
    (["--lora_rank=33", "--checkpoint=base"], "lora_rank=33: qkv is a matrix 32 x"),
    (["--lora_rank=4", "--checkpoint=base", "--lora_targets=mlp"], "'mlp' is none of"),
    (["--lora_rank=4", "--checkpoint=base", "--frozen=fp8"], "choose one of bf16, mxfp4"),
    (["--lora_rank=4", "--checkpoint=unpacked", "--frozen=mxfp4"],
     "frozen=mxfp4: unpacked holds unpacked experts"),
])  # fmt: skip
def test_bad_input(home, told, message, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_run(parse(["adapters.py", *told, "--name=bad"], ""))


def test_an_ended_run_without_states_is_not_begun_anew(home, monkeypatch):
    monkeypatch.chdir(home)
    (home / "runs/ended/model").mkdir(parents=True)
    (home / "runs/ended/model/adapters.json").write_text("{}")
    for more in [], ["--resume"]:
        with pytest.raises(ValueError, match="runs/ended already holds a run, which has ended and"):
            check_run(parse(["adapters.py", *LORA, "--name=ended", *more], ""))


def test_bad_input_is_one_line(home):
    run = Run(home, "adapters.py", *LORA, "--lora_rank=33", "--name=bad")
    assert run.wait() == [1] and "Traceback" not in run.text()
    assert len(run.text().splitlines()) == 1 and "lora_rank=33: qkv is a matrix" in run.text()
    assert not (home / "runs" / "bad").exists()


@pytest.mark.slow
def test_adapters_learn_the_answers(tmp_path, monkeypatch, capsys):
    """configs/tiny_lora.py on the model of configs/tiny.py: chats that were held back, and the
    keyword asked for in one of them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")

    def run(*arguments):
        assert Run(tmp_path, *arguments, ranks=2).wait(timeout=1800) == [0, 0]

    run("configs/tiny.py", "--eval_every=0", "--sample=")
    subprocess.run([sys.executable, "configs/finetune_chat.py", "data/chat.jsonl"], check=True)
    for name in "chat", "chat-val":
        data.main([f"data/{name}.jsonl", "--out", f"data/{name}", "--tokenizer=bytes"])
    run("configs/tiny_lora.py", "--eval_every=90")
    first, last = held_out(tmp_path, "tiny_lora").values()
    assert last < first and last < 0.1
    for model, known in ("tiny_lora", True), ("tiny", False):
        sample.write(
            f"runs/{model}", "Which keyword goes through a list?", chat=True, temperature=0
        )
        assert ("[final] It is for." in capsys.readouterr().out) == known


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


# --------------------------------------------------------------------------------------------------
# Rehearsal and dry run


@pytest.mark.parametrize("changes", [{}, {"shard_frozen": True}, {"lora_targets": "qkv", "sp": 2}])
def test_sent_bytes_are_what_a_rehearsal_counts(changes, home, monkeypatch):
    """Computing in bf16, with sizes that the ranks divide: exactly, but for a step's few numbers,
    which are summed."""
    monkeypatch.chdir(home)
    sizes = {**dataclasses.asdict(SIZES), "vocab_size": 264, "num_key_value_heads": 8}
    given = {"ranks": 4, "batch_size": 8, "lora_rank": 4, "lora_targets": EVERYTHING}
    given |= (
        {"frozen": "mxfp4", "recompute": "all", "name": "sent", "data": "random"} | sizes | changes
    )
    options = parse(["adapters.py", "--rehearse", *(f"--{k}={v}" for k, v in given.items())], "")
    monkeypatch.setattr("train.computed_in", lambda device: torch.bfloat16)
    found = rehearse(options, train_module.train)["sent_bytes"]
    config = model_config(options)
    expected = sent_bytes(config, **settings_of(options, config, 4))
    few = found.pop("all_reduce") - expected.pop("all_reduce")
    assert found == expected and 0 < few < 10_000


BOTH = "--lora_targets=attention,experts"
FASTER = ["--seq_len=32768", BOTH, "--recompute=attention", "--keep_blocks=8"]
LONG = ["--seq_len=131072", "--offload"]
LONGEST = ["--offload", BOTH, "--gpu_gib=80"]
WHOLE_CARD = ["--seq_len=131072", "--batch_size=1", "--recompute=attention", "--gpu_gib=0"]
MEASURED = [  # GiB at the peak, `python -m bench --adapters` on an H100, 2026-11-25
    (15.34, ["--seq_len=4096"]),
    (18.25, ["--seq_len=16384"]),
    (18.98, ["--seq_len=16384", BOTH]),
    (46.83, [*FASTER, "--gpu_gib=80"]),
    # with --adapters=whole on an H200, 2026-11-26
    (18.09, ["--seq_len=65536", "--offload"]),
    (21.88, LONG),
    (52.51, ["--seq_len=524288", *LONGEST]),
    (60.21, ["--seq_len=655360", *LONGEST]),
    (66.77, ["--seq_len=768000", *LONGEST]),
    # the config itself in train.py on one and on two H200s, 2026-11-26
    (56.56, [*WHOLE_CARD, "--optimizer=fp32"]),
    (39.69, [*WHOLE_CARD, "--optimizer=fp32", "--sp=2", "--ranks=2"]),
]


def planned(*told):
    """The options of a dry run of configs/gptoss_lora.py, and what `peak` asks for."""
    options = parse([str(ROOT / "configs/gptoss_lora.py"), "--dry_run", "--checkpoint=", *told], "")
    config = dataclasses.replace(GPTOSSConfig(), max_position_embeddings=2**20)
    return options, config, settings_of(options, config, options.ranks)


def planned_gib(*told):
    """On the experts the bench's adapters have rank 8, on attention 16, which is worth 0.1 GiB."""
    rank = 8 if BOTH in told else 16
    more = "--gpu_gib=23.5", f"--lora_rank={rank}", "--optimizer=split"
    _, config, settings = planned(*more, *told)
    assert settings["parameters"] < 1e8
    return peak(config, settings) / 2**30


@pytest.mark.parametrize("measured, told", MEASURED)
def test_the_dry_run_beside_measured_peaks(measured, told):
    assert abs(planned_gib(*told) / measured - 1) < 0.015


def test_the_dry_run_of_attention_in_one_group(monkeypatch):
    """128K tokens took 22.57 GiB on an H100 when its backward took all heads at once."""
    monkeypatch.setattr(budget, "tile_sizes", lambda gib: (4096, math.inf))
    monkeypatch.setattr(budget, "OF_DOCUMENTS", flash.ON_CUDNN)
    assert abs(planned_gib(*LONG) / 22.57 - 1) < 0.015


def test_unpacked_experts_work_as_in_full_training():
    """In one tile an output more than packed ones do (fast.py, frozen.py), and with no matrix
    that was unpacked for them."""
    working = []
    for frozen in "bf16", "mxfp4":
        _, config, settings = planned("--seq_len=32768", "--gpu_gib=80", f"--frozen={frozen}")
        working.append(needs(config, settings)["working set"])
    C, F, tokens = config.hidden_size, config.intermediate_size, 32768
    unpacked = 2 * 2 * config.num_experts * C * F
    assert working[0] - working[1] == 2 * config.experts_per_token * tokens * C - unpacked


@pytest.mark.parametrize("gib, told, fits", [
    (16, ["--seq_len=4096", "--offload"], True),
    (16, [], False),
    (24, [], True),
    (24, LONG, True),
    (24, ["--seq_len=262144", "--offload"], False),
    (48, [BOTH, "--recompute=attention"], True),
    (48, FASTER, False),
    (80, FASTER, True),
    (80, ["--seq_len=655360", "--offload", BOTH], True),
])  # fmt: skip
def test_what_fits_a_card(gib, told, fits):
    options, config, settings = planned(f"--gpu_gib={gib}", "--lora_rank=8", *told)
    first = next(verdict(options, config, settings, gib))
    assert first.startswith(f"{'fits' if fits else 'does not fit'} a GPU of {gib} GiB")


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
