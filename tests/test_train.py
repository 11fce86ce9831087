"""train.py: the real loop on one, two and four ranks, and the same numbers from all of them."""

import dataclasses
import weakref

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

import fast
import train as loop
from common import batch, run_ranks, tiny_config
from data import TokenData
from loop import log
from loop.budget import flops_of, flops_per_token
from loop.options import Options, model_config
from model import GPTOSS, IGNORED
from runs import TINY, Run, copy_run, held_out, losses, make_home, metrics, train, write_corpus
from snapshots import load_state, state_places


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


def whole_batch(home, options, data, indices):
    return TokenData(str(home / data), options.seq_len, seed=options.seed).batch(indices)


# --------------------------------------------------------------------------------------------------
# The same run on any number of ranks

EVALUATE = "--eval_every=6"
RUNS = {  # name: ranks, options
    "one": (1, ["--save_every=10", "--keep=9", EVALUATE]),
    "one-micro-batch": (1, ["--micro_batch=4", "--recompute=all"]),
    "two": (2, [EVALUATE]),
    "two-sp": (2, ["--sp=2", EVALUATE]),
    "four-sp": (4, ["--sp=2", EVALUATE]),
    "four-sp-replicas": (4, ["--sp=2", "--replicas=2"]),
}


def evaluate_seven_sequences(rank):
    loop.EVAL_TOKENS = 7 * 32


@pytest.fixture(scope="module")
def printed(home):
    """{name of a run: what it printed}"""
    return {
        name: train(
            home,
            *("tiny.py", f"--name={name}", *options),
            ranks=ranks,
            prepare=evaluate_seven_sequences,
        )
        for name, (ranks, options) in RUNS.items()
    }


def assert_same_losses(home, name, other, tolerance=1e-5):
    ours, theirs = losses(home, name), losses(home, other)
    assert len(ours) == len(theirs)
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs))
    assert worst <= tolerance, f"{name} against {other}: relative difference {worst:.1e}"


def assert_same_weights(home, name, other):
    """To the last bit."""
    ours, theirs = (GPTOSS.from_checkpoint(home / "runs" / run / "model") for run in (name, other))
    for (parameter, p), q in zip(ours.named_parameters(), theirs.parameters()):
        assert torch.equal(p, q), parameter


@pytest.mark.parametrize("name", [name for name in RUNS if name != "one"])
def test_losses_are_those_of_one_rank(home, printed, name):
    assert len(losses(home, "one")) == 12 and losses(home, "one")[-1] < losses(home, "one")[0] - 0.5
    assert_same_losses(home, name, "one")
    ours, theirs = metrics(home, name), metrics(home, "one")
    for a, b in zip(ours, theirs):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
        # a token between two experts may choose the other one
        assert a["expert_load"] == pytest.approx(b["expert_load"], rel=0.05)


def test_the_first_step_is_that_of_the_model_alone(home, printed):
    options, loads = tiny_options(), []
    tokens, targets, documents = whole_batch(home, options, "corpus", range(4))
    model = fresh_model(options)
    for block in model.blocks:
        block.mlp.router.register_forward_hook(
            lambda router, inputs, out: loads.append(out[0].flatten().bincount().double())
        )
    loss = model(tokens, targets, documents)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    expected = [(load.max() / load.mean()).item() for load in loads]
    first = metrics(home, "one")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert first["expert_load_by_layer"] == pytest.approx(expected, rel=1e-6)
    assert first["expert_load"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_evaluation_does_not_depend_on_the_ranks(home, printed):
    """Of seven sequences, which neither two groups of ranks nor micro-batches of two divide."""
    expected = held_out(home, "one")
    assert list(expected) == [5, 11]
    for name in ("two", "two-sp", "four-sp"):
        assert held_out(home, name) == pytest.approx(expected, rel=1e-5)
    model = GPTOSS.from_checkpoint(home / "runs/one/model")
    with torch.no_grad():
        loss = model(*whole_batch(home, tiny_options(), "held-out", range(7)))
    assert expected[11] == pytest.approx(loss.item(), rel=1e-6)


def test_evaluation_takes_every_sequence_once(home):
    """Of a corpus of fewer than EVAL_TOKENS, in micro-batches that do not divide it."""
    data = TokenData(str(home / "held-out"), 32)
    train(home, "tiny.py", "--steps=1", "--eval_every=1", "--micro_batch=4", "--name=eval")
    model = GPTOSS.from_checkpoint(home / "runs/eval/model")
    with torch.no_grad():
        loss = model(*data.batch(range(data.sequences_per_epoch)))
    assert data.sequences_per_epoch % 4
    assert held_out(home, "eval") == {0: pytest.approx(loss.item(), rel=1e-6)}


@pytest.mark.parametrize("ranks, sp", [(1, 1), (2, 1), (2, 2)])
def test_ranks_with_few_or_no_targets(home, ranks, sp):
    """Three targets in a hundred count: many a sequence, and so many a rank, has none of them."""
    if not (home / "sparse").exists():
        write_corpus(home / "sparse", counted=0.03)
    name, model = f"sparse-{ranks}-{sp}", fresh_model(tiny_options())
    arguments = ("tiny.py", "--data=sparse", "--steps=8", f"--sp={sp}", f"--name={name}")
    train(home, *arguments, ranks=ranks)
    steps = [range(4 * step, 4 * step + 4) for step in range(8)]
    batches = [whole_batch(home, tiny_options(), "sparse", indices) for indices in steps]
    counts = [[(s != IGNORED).sum().item() for s in targets] for _, targets, _ in batches]
    assert all(map(sum, counts)) and any(0 in sequences for sequences in counts)
    assert metrics(home, name)[0]["loss"] == pytest.approx(model(*batches[0]).item(), rel=1e-6)
    assert_same_losses(home, name, "sparse-1-1")


def without_fast_twins(rank):
    def broken(*_):
        raise AssertionError("a fast twin ran")

    for name, (definition, _) in fast.PAIRS.items():
        fast.PAIRS[name] = definition, broken


def test_fast_false_runs_the_definitions(home, printed):
    """Forward, backward and evaluation, with every fast twin broken."""
    arguments = ("tiny.py", "--recompute=all", "--eval_every=5", "--steps=5")
    train(home, *arguments, "--name=plain", "--fast=false", prepare=without_fast_twins)
    assert losses(home, "plain")[:4] == pytest.approx(losses(home, "one")[:4], rel=1e-5)
    broken = Run(home, *arguments, "--name=broken", prepare=without_fast_twins)
    assert broken.wait() == [1] and "a fast twin ran" in broken.text()


def test_sizes_that_are_no_multiple_of_anything(home):
    """The grouped matmuls cannot do them: the definition runs, and says so once."""
    sizes = ("--hidden_size=34", "--intermediate_size=18", "--head_dim=6")
    text = train(home, "tiny.py", *sizes, "--steps=3", "--name=odd")
    assert text.count("experts: plain PyTorch") == 1 and len(losses(home, "odd")) == 3


# --------------------------------------------------------------------------------------------------
# How gradients are summed


def sharded_gradients(ranks, optimizer, in_fp32):
    """{name: gradient}, whole, of a bf16 model over `ranks` ranks that each have other tokens."""
    config = tiny_config(hidden_size=24, intermediate_size=16)
    sizes = dataclasses.asdict(config)
    told = {"batch_size": ranks, "optimizer": optimizer, "recompute": "all", "keep_blocks": 2}
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))

    def policy(**settings):
        expected = torch.float32 if optimizer == "fp32" else torch.bfloat16
        assert settings["reduce_dtype"] == expected
        return MixedPrecisionPolicy(
            **settings | ({"reduce_dtype": torch.float32} if in_fp32 else {})
        )

    def reduce_scatter(module, device, dtype):
        in_bf16 = ranks <= 2 and optimizer == "split"
        assert dtype == (torch.bfloat16 if in_bf16 else torch.float32)
        return ReduceScatter(module, device, torch.float32 if in_fp32 else dtype)

    ReduceScatter = loop.ReduceScatter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "MixedPrecisionPolicy", policy)
        patch.setattr(loop, "ReduceScatter", reduce_scatter)
        cpu, options = torch.device("cpu"), Options(**sizes, **told)
        model = loop.build_model(options, config, cpu, mesh, torch.bfloat16)
    assert (model.recompute, model.keep_blocks) == ("all", 2)
    tokens, targets = batch(config, 2, 16, seed=dist.get_rank())
    model(tokens, targets, count=torch.tensor(24 * ranks)).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


SUMS = [(1, "split"), (2, "split"), (4, "split"), (2, "fp32")]


@pytest.mark.parametrize("ranks, optimizer", SUMS)
def test_bf16_sums_are_as_exact_as_fp32_ones(ranks, optimizer):
    found, expected = (
        run_ranks(ranks, sharded_gradients, ranks, optimizer, in_fp32)[0]
        for in_fp32 in (False, True)
    )
    dtype = torch.float32 if optimizer == "fp32" else torch.bfloat16
    assert {g.dtype for g in found.values()} == {dtype}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def reduced_into_gradients(optimizer):
    """For each of three micro-batches, of which the third follows an update: what ReduceScatter
    answered when FSDP asked it for memory, whether its sums become the gradients."""
    config, ranks = tiny_config(hidden_size=24, intermediate_size=16), dist.get_world_size()
    options = Options(**dataclasses.asdict(config), batch_size=ranks, optimizer=optimizer)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))
    model = loop.build_model(options, config, torch.device("cpu"), mesh, torch.bfloat16)
    answers = []

    def allocate(self, *args, **kwargs):
        answers[-1].append(self.makes_the_gradient())
        return original(self, *args, **kwargs)

    original = loop.ReduceScatter.allocate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.ReduceScatter, "allocate", allocate)
        for follows_an_update in (False, False, True):
            if follows_an_update:
                model.zero_grad()
            answers.append([])
            model(*batch(config, 1, 16)).backward()
    return answers


@pytest.mark.parametrize("ranks, optimizer", SUMS)
def test_whose_memory_gradients_take(ranks, optimizer):
    """What becomes a gradient takes the computation's memory; sums that are added to one, FSDP's.
    For each of the five modules FSDP asks twice: for what is sent, and for the sums."""
    for answers in run_ranks(ranks, reduced_into_gradients, optimizer):
        assert answers == [10 * [True], 10 * [False], 10 * [True]]


def exchanged_gradients():
    """Whether memory.ReduceScatter drops what it received when FSDP drops what was sent."""
    reduce = loop.ReduceScatter(torch.nn.Linear(8, 8), torch.device("cpu"), torch.float32)
    sent, sums = (torch.zeros(n, dtype=torch.bfloat16) for n in (64, 32))
    reduce(sums, sent, dist.group.WORLD, dist.ReduceOp.SUM)
    received = weakref.ref(sent.received)
    kept = received() is not None
    del sent
    return kept, received() is None


def test_what_is_received_lives_as_long_as_what_is_sent():
    assert run_ranks(2, exchanged_gradients) == [(True, True)] * 2


def gathered_and_computed():
    """What a step of a model of three blocks does, in order: "gather" for a gather of weights, or
    "wait" if it is waited for at once, and the name of a module whose forward or replay begins."""
    config, ranks, done = tiny_config(num_hidden_layers=3), dist.get_world_size(), []
    options = Options(**dataclasses.asdict(config), batch_size=ranks)
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replica", "shard"))
    model = loop.build_model(options, config, torch.device("cpu"), mesh, torch.float32)
    for name, module in [("embedding", model.embedding), *enumerate(model.blocks)]:
        module.register_forward_pre_hook(lambda *_, name=name: done.append(str(name)))
    name = "all_gather_single"  # since PyTorch 2.13
    name = name if hasattr(dist.ProcessGroup, name) else "_allgather_base"
    original = getattr(dist.ProcessGroup, name)

    def gather(self, output, shard, options):
        done.append("gather" if options.asyncOp else "wait")
        return original(self, output, shard, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist.ProcessGroup, name, gather)
        loss = model(*batch(config, 1, 16))
        done.append("backward")
        loss.backward()
    return done


def test_weights_are_gathered_ahead():
    """A block's while the module before it computes, in the backward while the one after it does;
    there neither the embedding's nor the last block's."""
    forward = "gather gather gather embedding gather 0 gather 1 2"
    for done in run_ranks(2, gathered_and_computed):
        assert " ".join(done) == f"{forward} backward gather 2 gather 1 0"


# --------------------------------------------------------------------------------------------------
# Metrics


def test_metrics_and_lines(home, printed):
    rows, fields = metrics(home, "two"), "step loss grad_norm lr epoch expert_load ms eta_s"
    fields = {*fields.split(), "tokens_per_s", "tokens_per_s_per_rank", "expert_load_by_layer"}
    assert all(row.keys() == fields for row in rows)
    sequences = TokenData(str(home / "corpus"), 32).sequences_per_epoch
    lines = [line for line in printed["two"].splitlines() if "| loss" in line]
    assert len(lines) == len(rows) == 12
    for line, row in zip(lines, rows):
        assert line == log.format_line(row, 12)
        assert (
            f"step {row['step']:2} | loss {row['loss']:7.4f} | grad norm {row['grad_norm']:7.3f}"
            in line
        )
        assert row["tokens_per_s"] == pytest.approx(4 * 32 / (row["ms"] / 1000))
        assert row["tokens_per_s_per_rank"] == pytest.approx(row["tokens_per_s"] / 2)
        assert row["eta_s"] == pytest.approx(row["ms"] / 1000 * (11 - row["step"]))
        assert row["epoch"] == pytest.approx(4 * (row["step"] + 1) / sequences)
        assert row["expert_load"] >= 1 and len(row["expert_load_by_layer"]) == 2
    assert len({line.index("lr") for line in lines}) == 1, "the numbers line up"
    full, room = (log.format_line(rows[0] | {"alloc_retries": n}, 12) for n in (3, 0))
    assert "memory nearly full, 3 stops so far" in full and "memory" not in room
    text = printed["two"]
    assert "step 11 | held out" in text and "Warning" not in "".join(printed.values())
    assert "128 tokens a step = 1 micro-batch x 2 groups (sp 1) x 2 sequences x 32 tokens" in text
    assert f"12 steps of 4 sequences: {48 / sequences:.3g} epochs of {sequences}" in text


def test_flops_of_packed_documents():
    """Each piece is a sequence of its own; a number that comes again later is another piece."""
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
    arguments = ("tiny.py", f"--name=mfu-{sp}", "--steps=2", f"--sp={sp}")
    train(home, *arguments, ranks=2, prepare=on_a_gpu_of_a_gigaflop)
    config = model_config(tiny_options())
    for row in metrics(home, f"mfu-{sp}"):
        indices = range(4 * row["step"], 4 * row["step"] + 4)
        _, _, documents = whole_batch(home, tiny_options(), "corpus", indices)
        assert documents.any()
        flops = flops_of(config, documents)
        assert row["mfu"] == pytest.approx(flops / (row["ms"] / 1000) / 2 / 1e9)


# --------------------------------------------------------------------------------------------------
# Learning rate, decay, clipping


def test_learning_rate(home, printed):
    options = tiny_options(steps=100, warmup_steps=10, lr=2.0)
    rates = [loop.learning_rate(options, step) for step in range(101)]
    assert rates[:11] == pytest.approx([0.2 * (step + 1) for step in range(10)] + [2.0])
    assert rates[55] == pytest.approx(2 * (0.1 + 0.9 / 2)) and rates[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    short = tiny_options(steps=1, warmup_steps=0)
    assert loop.learning_rate(short, 0) == 3e-3, "nothing divides by zero"
    expected = [loop.learning_rate(tiny_options(), step) for step in range(12)]
    assert [row["lr"] for row in metrics(home, "one")] == expected


def test_the_learning_rate_is_applied(home):
    train(home, "tiny.py", "--steps=2", "--warmup_steps=0", "--lr=1e-30", "--name=still")
    old, new = fresh_model(tiny_options()), GPTOSS.from_checkpoint(home / "runs/still/model")
    for (name, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.allclose(p, q, rtol=0, atol=1e-20), name


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
def test_decay_is_for_matrices(optimizer):
    """The experts' biases have two dimensions and are no matrices."""
    options = tiny_options(weight_decay=0.1, optimizer=optimizer)
    model = GPTOSS(model_config(options))
    names = {p: name for name, p in model.named_parameters()}
    decayed, others = (
        {names[p] for p in group["params"]}
        for group in loop.build_optimizer(options, model).param_groups
    )
    parts = "attention.qkv.weight attention.out.weight mlp.router.weight mlp.gate_up_weight"
    parts = f"{parts} mlp.down_weight".split()
    matrices = {f"blocks.{n}.{part}" for n in (0, 1) for part in parts}
    assert decayed == matrices | {"embedding.weight", "unembedding.weight"}
    assert decayed | others == set(names.values()) and not decayed & others
    groups = loop.build_optimizer(options, model).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0]


def rounded_master(rank):
    """optimizer=split without the low bits of its master weights: plain bf16."""
    step = loop.SplitAdamW.step

    def forgetful(self):
        step(self)
        for state in self.state.values():
            state["rest"].zero_()

    loop.SplitAdamW.step = forgetful


def test_split_follows_fp32_and_plain_bf16_does_not(home):
    """At a learning rate far below bf16's resolution of the weights."""
    dropped = {}
    for name, prepare in ("fp32", None), ("split", None), ("bf16", rounded_master):
        optimizer = "fp32" if name == "fp32" else "split"
        options = ("--lr=1e-5", "--warmup_steps=0", "--steps=20", f"--optimizer={optimizer}")
        options += "--micro_batch=4", f"--name=optimizer-{name}"
        train(home, "tiny.py", *options, prepare=prepare)
        curve = losses(home, f"optimizer-{name}")
        dropped[name] = sum(curve[:5]) - sum(curve[-5:])
    assert dropped["split"] == pytest.approx(dropped["fp32"], rel=0.02)
    assert abs(dropped["bf16"] - dropped["fp32"]) > 0.05 * dropped["fp32"]


def test_clipping(home):
    """The log has the norm before clipping. Clipped gradients show in Adam's first moments, not in
    its first step."""

    def moments(name):
        total = 0
        for path in (home / "runs" / name / "states/step-00000001").glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                names = [key for key in file.keys() if key.startswith("exp_avg.")]  # noqa: SIM118
                total += sum(file.get_tensor(key).double().square().sum() for key in names)
        return total.sqrt().item() / 0.1

    for name, limit in ("free", 0), ("clipped", 0.01):
        options = ("--steps=1", "--save_every=1", f"--grad_clip={limit}", f"--name={name}")
        train(home, "tiny.py", *options)
    norm = metrics(home, "free")[0]["grad_norm"]
    assert metrics(home, "clipped")[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert moments("free") == pytest.approx(norm, rel=1e-5)
    assert moments("clipped") == pytest.approx(0.01, rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Other parameters, other optimizers

FROZEN = ("embedding.weight", "blocks.0.mlp.down_weight", "blocks.1.attention.sinks")


def freeze_some(rank):
    build = loop.build_model

    def build_model(*arguments):
        model = build(*arguments)
        for name in FROZEN:
            model.get_parameter(name).requires_grad_(False)
        return model

    loop.build_model = build_model


def names_in(state):
    names = set()
    for path in state.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


@pytest.mark.parametrize("optimizer", ["fp32", "split"])
def test_frozen_parameters(home, optimizer):
    """They get no update, no weight decay, no optimizer state, and are no part of a saved state."""
    name, again = f"frozen-{optimizer}", f"frozen-{optimizer}-again"
    options = ("tiny.py", f"--optimizer={optimizer}", "--steps=6", "--save_every=3", "--sp=2")
    for run in (name, again):
        if run == again:
            copy_run(home, name, again, 3)
        arguments = (*options, "--weight_decay=0.1", f"--name={run}", "--resume")
        train(home, *arguments, ranks=2, prepare=freeze_some)
    old = fresh_model(tiny_options()).to(torch.float32 if optimizer == "fp32" else torch.bfloat16)
    new = GPTOSS.from_checkpoint(home / "runs" / name / "model")
    for (parameter, p), q in zip(old.named_parameters(), new.parameters()):
        assert torch.equal(p.float(), q.float()) == (parameter in FROZEN), parameter
    kinds = ("", "exp_avg.", "exp_avg_sq.") + (("rest.",) if optimizer == "split" else ())
    names = dict(old.named_parameters()).keys() - set(FROZEN)
    expected = {kind + parameter for kind in kinds for parameter in names}
    state = home / "runs" / name / "states/step-00000006"
    assert names_in(state) == expected
    for use in load_state, state_places:
        lacks = f"lacks embedding.weight and 2 more: .* frozen, .*runs/{name}/model has them once"
        with pytest.raises(ValueError, match=lacks):
            use(state)
    assert losses(home, again) == losses(home, name)
    assert_same_weights(home, again, name)


class MuonAndAdamW:
    """What a user may write: Muon for matrices in the blocks, AdamW for the rest."""

    def __init__(self, options, model):
        named = dict(model.named_parameters())
        matrices = [n for n, p in named.items() if p.dim() == 2 and n.endswith("weight")]
        matrices = [n for n in matrices if n.startswith("blocks.")]
        muon = torch.optim.Muon([named.pop(n) for n in matrices], lr=options.lr)
        self.parts = muon, torch.optim.AdamW(named.values(), lr=options.lr, weight_decay=0)
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    @property
    def state(self):
        return {p: state for part in self.parts for p, state in part.state.items()}

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def train_with_muon(rank):
    loop.build_optimizer = MuonAndAdamW


def test_another_optimizer_is_saved_and_resumed(home):
    options = ("tiny.py", "--steps=6", "--save_every=3")
    text = train(home, *options, "--name=muon", prepare=train_with_muon)
    copy_run(home, "muon", "muon-again", 3)
    again = (*options, "--name=muon-again", "--resume")
    assert "goes on after step 2" in train(home, *again, prepare=train_with_muon), text
    names = names_in(home / "runs/muon/states/step-00000006")
    assert "momentum_buffer.blocks.0.attention.qkv.weight" in names
    assert "exp_avg.embedding.weight" in names
    assert losses(home, "muon-again") == losses(home, "muon") != losses(home, "frozen-fp32")
    assert_same_weights(home, "muon-again", "muon")
