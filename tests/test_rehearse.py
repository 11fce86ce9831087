"""loop/rehearse.py: the stand-in for the process group sends what real ranks send, in their order,
and what a rehearsal leaves behind."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import loop.rehearse as rehearsal
import sp
from loop import guards
from loop.budget import BYTES, count_parameters, sent_bytes
from loop.options import Options, model_config, parse
from loop.plan import settings_of
from loop.rehearse import KINDS, StandIn, stand_in
from runs import Run, make_home
from train import build_model, build_optimizer, start_ranks, train

KEYS = {"peak_gib", "reserved_gib", "alloc_retries", "dry_run_gib", "seconds", "copy_seconds"}
KEYS |= {"tokens_per_s_per_rank", "mfu", "sent_bytes", "sending_seconds", "hideable_share", "gbps"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


# --------------------------------------------------------------------------------------------------
# What is sent


def count_calls(rank):
    """Make a rank of a real run write the collectives it calls, with the bytes of a ring or of a
    full exchange, and a rehearsal those of its stand-in."""
    calls, group = [], dist.ProcessGroup

    def counted(name, kind, sent):
        original = getattr(group, name)

        def call(self, *args):
            summed = kind == "all_to_all" and self is not sp.group()
            calls.append(["reduce_scatter" if summed else kind, sent(self.size(), *args)])
            return original(self, *args)

        setattr(group, name, call)

    def each_sends(tensor):
        return lambda n, *args: args[tensor].nbytes * (n - 1) // n

    names = {  # PyTorch 2.13 and later, before
        "all_gather": ("all_gather_single", "_allgather_base"),
        "reduce_scatter": ("reduce_scatter_single", "_reduce_scatter_base"),
        "all_to_all": ("all_to_all_single", "alltoall_base"),
        "all_reduce": ("allreduce", "allreduce"),
    }
    sent = {
        "all_gather": each_sends(0),  # the output
        "reduce_scatter": each_sends(1),  # the input
        "all_to_all": each_sends(1),  # of sp's group, else half of memory.ReduceScatter
        "all_reduce": lambda n, tensors, *_: sum(2 * t.nbytes * (n - 1) // n for t in tensors),
    }
    for kind, (new, old) in names.items():
        counted(new if hasattr(group, new) else old, kind, sent[kind])
    sys.modules["train"].computed_in = lambda device: torch.bfloat16  # as on a GPU
    original = rehearsal.measured

    def measured(options, config, ranks, steps, real):
        found = calls if real else [[kind, size] for kind, size, _ in StandIn.calls]
        Path(f"{'real' if real else 'stand-in'}.json").write_text(json.dumps(found))
        return original(options, config, ranks, steps, real)

    rehearsal.measured = measured


CASES = {  # ranks, options
    "FSDP": (2, []),
    "Ulysses": (2, ["--sp=2", "--recompute=attention"]),
    "Ulysses, split on more than two": (4, ["--sp=2", "--optimizer=split"]),
    "replicas, Ulysses, split": (4, ["--sp=2", "--replicas=2", "--optimizer=split"]),
}


@pytest.mark.parametrize("ranks, given", CASES.values(), ids=CASES)
@pytest.mark.slow
def test_the_stand_in_sends_what_real_ranks_send(ranks, given, tmp_path):
    """Over gloo, with packed documents and several micro-batches: the same calls in the same order,
    of the same bytes, from the first step to the last."""
    home = make_home(tmp_path)
    common = ["tiny.py", "--rehearse=true", "--micro_batch=1", *given]
    Run(home, *common, "--name=real", ranks=ranks, prepare=count_calls).ends_well()
    Run(home, *common, f"--ranks={ranks}", prepare=alone).ends_well()
    names = "real", "stand-in"
    real, rehearsed = (json.loads((home / f"{name}.json").read_text()) for name in names)
    assert rehearsed == real and {kind for kind, size in real if size} == kinds_of(given)
    found = json.loads((home / "runs/tiny/rehearsal.json").read_text())["sent_bytes"]
    totals = {kind: sum(size for k, size in real if k == kind) for kind in KINDS}
    assert found == {kind: total // 4 for kind, total in totals.items()}, "the mean of four steps"


def kinds_of(given):
    return set(KINDS) - (set() if "--sp=2" in given else {"all_to_all"})


def without_torchrun(rank):
    for name in "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE":
        os.environ.pop(name)


def alone(rank):
    without_torchrun(rank)
    count_calls(rank)


@pytest.mark.parametrize(
    "changes", [{}, {"sp": 2, "micro_batch": 2, "optimizer": "split"}, {"replicas": 2}]
)
@pytest.mark.slow
def test_sent_bytes_are_what_the_stand_in_counts(changes, home, monkeypatch):
    """With sizes that the ranks divide: exactly, but for a step's few numbers, which are summed."""
    monkeypatch.chdir(home)
    sizes = {
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_experts": 8,
        "vocab_size": 264,
    }
    given = {"ranks": 8, "batch_size": 16, "micro_batch": 1, "recompute": "all"} | sizes | changes
    options = parse(["tiny.py", *(f"--{k}={v}" for k, v in given.items())], "")
    monkeypatch.setattr("train.computed_in", lambda device: torch.bfloat16)
    options.rehearse, options.data, options.name = True, "random", "sent"
    options.save_every = 1

    def never(*_, **__):
        raise AssertionError("random weights were saved")

    monkeypatch.setattr("train.save_weights", never)
    monkeypatch.setattr("train.States.save", never)
    found = rehearsal.rehearse(options, train)["sent_bytes"]
    config = model_config(options)
    expected = sent_bytes(config, **settings_of(options, config, 8))
    few = found.pop("all_reduce") - expected.pop("all_reduce")
    assert found == expected and 0 < few < 10_000
    assert set(expected) == {"all_gather", "reduce_scatter", "all_to_all"}


# --------------------------------------------------------------------------------------------------
# What the stand-in computes


def test_collectives_of_the_stand_in():
    with stand_in(4):
        dist.init_process_group("gloo")
        assert (dist.get_rank(), dist.get_world_size()) == (0, 4)
        shard, whole = torch.arange(10.0), torch.empty(40)
        rehearsal_gather(whole, shard)
        parts = whole.chunk(4)
        assert torch.equal(parts[0], shard), "this rank's own shard is as it is"
        for r in 1, 2, 3:  # the others' are shifted: other numbers at each place
            assert torch.equal(parts[r], shard.roll(3 * r))
        out = torch.empty(10)
        rehearsal_scatter(out, torch.arange(40.0))
        assert torch.equal(out, torch.arange(40.0).view(4, 10).sum(0))
        total = torch.tensor([2.0])
        dist.all_reduce(total)
        assert total == 8
        largest = torch.tensor([2.0])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        assert largest == 2
        pair = torch.arange(8.0).view(4, 2)
        exchanged = torch.empty(4, 2)
        dist.all_to_all_single(exchanged, pair)
        assert torch.equal(exchanged, pair)
        # outside of sp's group: half of a reduce-scatter
        assert StandIn.calls[-1][:2] == ("reduce_scatter", 8 * 4 - 8)
        group = dist.new_group(backend="gloo")
        told = ["anything"]
        dist.broadcast_object_list(told, src=0, group=group)
        assert told == ["anything"]
        dist.barrier()
    assert not dist.is_initialized()


def rehearsal_gather(whole, shard):
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(whole, shard)


def rehearsal_scatter(out, whole):
    (getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor)(out, whole)


def test_documents_of_other_slices_stay_apart():
    """A sequence of 4 x 3 tokens: the other ranks' documents are this rank's with other numbers."""
    with stand_in(4):
        start_ranks(Options(sp=4))
        whole = sp.gather_sequence(torch.tensor([[0, 0, 1], [0, 1, 2]]))
        assert {kind for kind, *_ in StandIn.calls} == {"all_to_all"}
    assert sp.size() == 1, "what follows in this process shares no sequence"
    assert whole.shape == (2, 12)
    assert torch.equal(whole[:, :3], torch.tensor([[0, 0, 1], [0, 1, 2]]))
    for sequence in whole:
        slices = [set(part.tolist()) for part in sequence.chunk(4)]
        assert all(a.isdisjoint(b) for i, a in enumerate(slices) for b in slices[:i])


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
@pytest.mark.slow
def test_a_rank_has_its_share_of_memory(optimizer):
    """Weights and optimizer state of one of eight: an eighth of what the dry run's table says."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 512, "num_experts": 8}
    options = Options(**sizes, num_hidden_layers=2, optimizer=optimizer, ranks=8, batch_size=8)
    config = model_config(options)
    with stand_in(8):
        device, mesh = start_ranks(options)
        model = build_model(options, config, device, mesh, torch.bfloat16)
        made = build_optimizer(options, model)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        made.step()
        local = [p.to_local().nbytes for p in model.parameters()]
        state = [
            value.to_local().nbytes
            for p in model.parameters()
            for value in made.state[p].values()
            if value.dim()
        ]
    weight, _, moments = BYTES[optimizer]
    parameters = count_parameters(config)
    assert sum(local) == pytest.approx(weight * parameters / 8, rel=0.01)
    assert sum(state) == pytest.approx(moments * parameters / 8, rel=0.01)


# --------------------------------------------------------------------------------------------------
# What it prints and leaves


def command(home, *arguments):
    arguments = "tiny.py", "--rehearse=true", *arguments
    return Run(home, *arguments, prepare=without_torchrun).ends_well().text()


def test_a_rehearsal_writes_its_numbers_and_touches_nothing_else(home):
    """A folder that holds a run keeps it."""
    run = home / "runs" / "there"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    text = command(home, "--name=there", "--ranks=2", "--checkpoint=nowhere", "--gbps=100")
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "rehearsal.json"]
    assert (run / "metrics.jsonl").read_text() == "{}\n"
    found = json.loads((run / "rehearsal.json").read_text())
    assert found.keys() >= KEYS and found["ranks"] == 2 and found["gbps"] == 100
    unknown = {key for key in KEYS if found[key] is None}
    assert unknown == {"peak_gib", "reserved_gib", "alloc_retries", "copy_seconds", "mfu"}, "a CPU"
    assert found["seconds"] > 0 and found["tokens_per_s_per_rank"] == pytest.approx(
        32 * 4 / 2 / found["seconds"]
    )
    total = sum(found["sent_bytes"].values())
    assert found["sending_seconds"] == pytest.approx(total / 100e9)
    assert found["hideable_share"] == 1, "without sequence parallelism all of it is FSDP's"
    assert "checkpoint=nowhere is not there: the sizes given, 2 layers, 4 experts" in text
    assert "tokens: corpus\n" in text and "one of 2 ranks" in text
    assert "Not in it: the time to send, waiting for other ranks" in text
    assert set((home / "runs").iterdir()) <= {home / "runs" / n for n in ("there", "sent", "tiny")}


@pytest.mark.slow
def test_tokens_are_random_where_the_data_cannot_serve(home):
    text = command(home, "--name=tiny", "--data=nowhere", "--ranks=2", "--sp=2")
    assert "tokens: random, because data=nowhere cannot serve: nowhere/meta.json: no such" in text
    text = command(home, "--name=tiny", "--batch_size=4096", "--micro_batch=2048", "--ranks=2")
    assert "random, because data=corpus cannot serve: it fills fewer than 4096" in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks=3", "--sp=2"], "sp=2 times replicas=1 must divide the number of ranks, 3"),
        (["--ranks=8"], "batch_size=4 must be a multiple of 16"),
        (["--gbps=0"], "gbps=0.0 must be positive"),
    ],
)
def test_wrong_options(arguments, message, home, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as error:
        rehearsal.rehearse(parse(["tiny.py", "--rehearse=true", *arguments], ""), train)
    assert "\n" not in str(error.value)


def test_out_of_memory_is_one_line(home, monkeypatch, capsys):
    """With what to turn; and nothing is written."""
    monkeypatch.chdir(home)

    def train(options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nand more")

    options = parse(["tiny.py", "--rehearse=true", "--ranks=2", "--name=full"], "")
    with pytest.raises(
        ValueError, match="^rehearsal as one of 2 ranks: out of memory: try "
    ) as error:
        rehearsal.rehearse(options, train)
    assert "\n" not in str(error.value) and "--recompute=attention" in str(error.value)
    assert not (home / "runs" / "full").exists() and not dist.is_initialized()


def test_ctrl_c_ends_it(home, monkeypatch):
    """At the end of a step, and the signal's handlers are what they were."""
    monkeypatch.chdir(home)
    before = signal.getsignal(signal.SIGINT)

    class Stop(guards.Stop):
        asked = True

    monkeypatch.setattr("train.Stop", Stop)
    options = parse(["tiny.py", "--rehearse=true", "--ranks=2", "--name=stopped"], "")
    with pytest.raises(KeyboardInterrupt):
        rehearsal.rehearse(options, train)
    assert signal.getsignal(signal.SIGINT) is before
    assert not (home / "runs" / "stopped").exists()
