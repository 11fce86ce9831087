"""Train GPT-OSS: FSDP2 over all ranks, Ulysses over groups of them, in one flat script.

    torchrun --nproc_per_node 2 train.py configs/tiny.py                  # a laptop, no download
    torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py --lr=1e-5  # the real model
    python train.py configs/tiny.py --sp=1                                # one device
    python train.py --help                                                # every option

A config file is Python that assigns options, `seq_len = 64 * 1024`. It is code: run only those you
trust. A run lives in runs/NAME: config.json, metrics.jsonl, loss.png, states/ to resume from, and
model/, the trained weights.

A batch depends on the step alone, never on the number of ranks: on 1, 2 or 8 ranks, at any sp, a
run sees the same tokens in the same order, and a resumed run continues as if it had never stopped.

This file computes the gradient and the update; what stands around them is in loop/.
"""

import os

from loop import importing  # before torch, whose import it times

# Read when torch is imported. Segments that can grow leave fewer holes in a GPU's memory.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import math
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import fast
import lora
import sample
import sp
from fast import say
from folders import exists
from loop import memory
from loop.budget import GIB, adds_in_bf16
from loop.checks import check_new, check_run
from loop.guards import (
    TIME_TO_REPORT,
    Stop,
    Watch,
    describe_bad_step,
    fail,
    hold,
    meeting_point,
)
from loop.log import Log
from loop.memory import HostMemory, ReduceScatter, SplitAdamW
from loop.options import parse
from loop.plan import dry_run
from loop.rehearse import rehearse
from loop.states import Progress, States, identity, trained
from model import GPTOSS, IGNORED
from weights import COMPANIONS, HF_CONFIG, copy_companions, load_weights, save_weights

EVAL_TOKENS = 2**21  # of held-out data in an evaluation, at most
BAD_STEPS = 5  # a run ends after this many skipped updates in a row

# --------------------------------------------------------------------------------------------------
# Ranks, model, optimizer


def group_of(rows, timeout=None):
    """The process group of this rank: that of its row in `rows` (groups, ranks of each), which
    cover all ranks. timeout: a timedelta; None: PyTorch's own, which init_device_mesh would set."""
    if len(rows) == 1:
        return dist.group.WORLD
    return dist.new_subgroups_by_enumeration(rows.tolist(), timeout=timeout)[0]


def start_ranks(options):
    """Set up the process group, also for a single rank. Returns the device and FSDP's mesh: 1-d
    ("shard") over all ranks, or with replicas 2-d ("replica", "shard"), where neighbouring ranks
    share one copy of the model."""
    if options.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # or a kernel would fill each new tensor: see memory.ReduceScatter
        torch.utils.deterministic.fill_uninitialized_memory = False
    # past this limit FlexAttention would silently compute S x S scores
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        fit_card(options.gpu_gib)
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    timeout = timedelta(seconds=options.timeout + TIME_TO_REPORT)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timeout,
        device_id=device if cuda else None,
        **meeting_point(options.timeout),
    )

    mesh, kind = DeviceMesh.from_group, device.type
    ranks = torch.arange(dist.get_world_size())
    sharing = ranks.view(-1, options.sp)  # neighbours share a sequence
    sp.init(mesh(group_of(sharing, timeout), kind) if options.sp > 1 else None)
    copies = ranks.view(options.replicas, -1)
    if options.replicas == 1:
        return device, mesh(group_of(copies, timeout), kind, mesh_dim_names=("shard",))
    groups = [group_of(copies.T, timeout), group_of(copies, timeout)]
    return device, mesh(groups, kind, copies, mesh_dim_names=("replica", "shard"))


def fit_card(gib):
    """Use at most `gib` GiB of the GPU, or all if it is 0, and trade speed for memory on a small
    one."""
    total = torch.cuda.get_device_properties().total_memory / GIB
    if 0 < gib < total:
        torch.cuda.set_per_process_memory_fraction(gib / total)
    gib = min(gib or total, total)
    fast.fit_tiles(gib)
    memory.AHEAD = memory.ahead(gib)


def computed_in(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def build_model(options, config, device, mesh, dtype):
    """The model, sharded, computing in `dtype`: built on the meta device, sharded, allocated, and
    only then loaded or initialised, so that no rank ever holds all of it."""
    with torch.device("meta"):
        model = GPTOSS(config, options.recompute, options.keep_blocks)
    stored = torch.float32 if options.optimizer == "fp32" else torch.bfloat16
    in_bf16 = dtype == torch.bfloat16 and adds_in_bf16(mesh.size(), options.optimizer)
    summed = torch.bfloat16 if in_bf16 else torch.float32
    # Gradients that are computed in bf16 and kept in it reach ReduceScatter as they are, which sums
    # them as said. Not with replicas: FSDP itself adds up what they have.
    reduced = stored if dtype == stored and options.replicas == 1 else summed
    # inputs keep their dtype, because rotary tables are in fp32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False
    )
    mesh = mesh if options.replicas > 1 else mesh["shard"]
    whole = set()  # parameters of which every rank holds all
    if options.lora_rank:
        lora.adapt_as(options, model.to(dtype), stored)
        if not options.shard_frozen:
            whole = set(lora.base(model).values())
    else:
        model = model.to(stored)
    # A group of its own, because its gradient does not depend on its weights: the backward does
    # without them. Not where every rank holds all of them.
    embedding = [] if model.embedding.weight in whole else [model.embedding]
    parts = [*embedding, *model.blocks]
    for module in [*parts, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=whole)
        # The loss is divided by the number of targets on all ranks, so gradients are summed. Not by
        # NCCL's scaled sum, which FSDP would ask for and gloo does not have.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
        if reduced == stored:  # the sums are the gradients: activations may use their memory too
            module.set_custom_reduce_scatter(ReduceScatter(module, device, summed))
    for module in embedding:
        module.set_unshard_in_backward(False)
    model.blocks[-1].set_reshard_after_forward(False)  # the backward begins with it
    # Gathered asynchronously, weights lie in memory of the computing stream, and activations can
    # use it after them. FSDP's own stream would keep it: 3.7 GiB for the 20b, docs/LOG.md,
    # 2026-11-26. FSDP then prefetches in the forward only what it is told to.
    model._set_unshard_async_op(True)
    for module, following in zip([model, *parts], parts):
        module.set_modules_to_forward_prefetch([following])
    for method in ("logprobs", "routes"):  # FSDP gathers weights for forward() alone
        register_fsdp_forward_method(model, method)
    model.to_empty(device=device)
    if options.lora_rank:
        if options.offload and not options.shard_frozen:
            lora.embed_on_host(model)
        lora.load_base(model, options.checkpoint, options.seed)
    elif options.checkpoint:
        load_weights(model, options.checkpoint)
    else:
        model.init_weights(options.seed)
    return model


def build_optimizer(options, model):
    """AdamW on the parameters that require a gradient; weight decay on matrices only. Another
    optimizer can stand in its place: saving and resuming take whatever state it has."""
    matrices, others = [], []
    for name, p in trained(model).items():
        matrix = name.endswith(("weight", "lora_a", "lora_b")) and not name.endswith("norm.weight")
        (matrices if matrix else others).append(p)
    groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    settings = {"lr": options.lr, "betas": (0.9, 0.95)}
    if options.optimizer == "split":
        return SplitAdamW(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def gradient_norm_squared(model):
    """The squared norm of this rank's shards of all gradients: norms in fp32, their sum in fp64."""
    gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    return torch.stack(norms).double().square().sum()


def scale_gradients_(model, factor):
    # a function of its own: in train() the list would hold the gradients through the next step
    torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], factor)


def skip_update(options, model, at, loss, norm, log, states):
    """Count and report a step without an update. FloatingPointError after BAD_STEPS in a row."""
    at.skipped += 1
    many = f"update skipped, {at.skipped} in a row"
    log.say(f"step {at.step}: loss {loss}, gradient norm {norm}: {many}")
    if at.skipped == BAD_STEPS:
        states.wait()  # what is still being written may be the last good state
        raise FloatingPointError(describe_bad_step(model, at, options))


def learning_rate(options, step):
    """Linear warm-up, then half a cosine down to a tenth of lr."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.lr * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


# --------------------------------------------------------------------------------------------------
# Batches and losses


def my_sequences(options, first, number):
    """Those of the sequences [first, first + number) that this rank's sequence-parallel group
    computes: one range per micro-batch."""
    groups, group = dist.get_world_size() // options.sp, dist.get_rank() // options.sp
    for start in range(first, first + number, groups * options.micro_batch):
        mine = start + group * options.micro_batch
        yield range(mine, mine + options.micro_batch)


def to_model(batch, device):
    """This rank's slice of whole sequences: tokens, targets, and documents, or None if each
    sequence is one document, because a plain causal mask has the fastest kernel."""
    tokens, targets, documents = batch
    slices = sp.shard(tokens, targets, documents if documents.any() else None)
    return [x if x is None else x.to(device) for x in slices]


def all_sum(*numbers, device):
    """Each number summed over all ranks."""
    total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(options, model, data, device):
    """Mean loss over the first EVAL_TOKENS of `data`, the same on any number of ranks."""
    last = min(math.ceil(EVAL_TOKENS / options.seq_len), data.sequences_per_epoch)
    together = dist.get_world_size() // options.sp * options.micro_batch  # sequences at a time
    loss, count, one = 0, 0, torch.ones((), device=device)
    for mine in my_sequences(options, 0, math.ceil(last / together) * together):
        tokens, targets, documents = data.batch(mine)
        targets[[i >= last for i in mine]] = IGNORED  # every rank calls the model equally often
        count += (targets != IGNORED).sum() / options.sp
        loss += model(*to_model((tokens, targets, documents), device), count=one)  # the sum
    loss, count = all_sum(loss, count, device=device)
    return loss / max(count, 1)


# --------------------------------------------------------------------------------------------------
# The run


def train(options):
    """The whole run. True if it has come to its end, with its model written."""
    # each rank checks its options and files by itself, before the ranks meet
    options, config, data, held_out = check_run(options)
    folder = Path("runs") / options.name
    if os.environ.get("RANK", "0") == "0":
        hold(folder)
        check_new(options)  # again: another run of this name may have held the folder until now
    watch = Watch(options)
    device, mesh = start_ranks(options)

    who = identity(options, config, data) | lora.identity_of(options)
    states = States(folder / "states", options, who)
    at = states.newest() if options.resume else Progress()
    # past the last step, or at it with the model written
    if at.step > options.steps or (at.ended(options) and exists(folder / "model")):
        say(f"{folder} has ended after step {at.step - 1}: nothing is left to do")
        return leave(watch)
    dtype = computed_in(device)
    model = build_model(options, config, device, mesh, dtype)
    optimizer = build_optimizer(options, model)
    states.attach(model, optimizer, at)
    log = Log(options, model, folder, device, data, held_out, at.step)
    stop = watch.stop = Stop()

    while not at.ended(options):
        # the gradient of the mean loss over all counted targets of the step, on all ranks together
        log.begin()
        indices = my_sequences(options, at.step * options.batch_size, options.batch_size)
        batches = [data.batch(mine) for mine in indices]
        # the `sp` ranks of a group count the same sequences
        counted = sum((targets != IGNORED).sum() for _, targets, _ in batches) / options.sp
        (total,) = all_sum(counted, device=device)
        loss, count = 0, torch.tensor(total, device=device)
        for batch in batches:
            with HostMemory() if options.offload else nullcontext():
                share = model(*to_model(batch, device), count=count)
            share.backward()
            loss += share.detach()
        squares = gradient_norm_squared(model) / options.replicas  # each of which has them all
        loss, norm, asked = all_sum(loss, squares, stop.asked, device=device)
        norm, lr = math.sqrt(norm), learning_rate(options, at.step)

        # the update; or none, on all ranks alike
        if math.isfinite(loss) and math.isfinite(norm):
            if options.grad_clip and norm > options.grad_clip:
                scale_gradients_(model, options.grad_clip / norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            at.updates, at.skipped = at.updates + 1, 0
        else:
            skip_update(options, model, at, loss, norm, log, states)
        optimizer.zero_grad()
        at.step += 1

        # log, save, evaluate
        last = at.step == options.steps or asked > 0
        log.step(batches, step=at.step - 1, loss=loss, grad_norm=norm, lr=lr, show=last)
        if (asked and not options.rehearse) or at.due(options.save_every, last):
            states.save(at)
        if asked and at.step < options.steps:
            break
        if held_out and at.due(options.eval_every, last):
            held_out_loss = evaluate(options, model, held_out, device)
            better = at.judge(held_out_loss)
            log.evaluation(at, held_out_loss, better)
            states.evaluated(at, held_out_loss, better)

    states.wait()
    if options.rehearse:
        return leave(watch)
    if at.ended(options):
        if at.waited and at.best and not options.keep_best:
            best = f"the best, held out {at.best:.4f}"
            log.say(f"model/ holds the last weights; --keep_best keeps {best}")
        save_model(options, model, folder, dtype, states)
    else:
        log.say(f"asked to stop: --resume goes on after step {at.step - 1}")
    log.plot()
    leave(watch)
    return at.ended(options)


def save_model(options, model, folder, dtype, states):
    """Write runs/NAME/model: the trained weights, or with keep_best those of the best state."""
    (step, loss), which = states.best() if options.keep_best else (None, None), ""
    if step:
        states.load(step, {name: p.detach() for name, p in trained(model).items()})
        which = f": the best ones, of step {step - 1}, held out {loss:.4f}"

    def write_config(path):
        model.config.to_json(path)
        if options.checkpoint:
            copy_companions(Path(options.checkpoint), path.parent, (*COMPANIONS, HF_CONFIG))

    try:
        if options.lora_rank:
            lora.save_adapters(model, folder / "model", lora.settings_of(options), write_config)
        else:
            save_weights(model, folder / "model", dtype, write_config)
    except OSError as error:
        raise OSError(f"cannot write {folder / 'model'}: {error}") from None
    say(f"{'adapters' if options.lora_rank else 'weights'} are in {folder / 'model'}{which}")


def leave(watch):
    dist.barrier()
    watch.end()  # from here on a rank may be silent
    dist.destroy_process_group()


def write_sample(options):
    """Continue the prompt `sample` with the model in runs/NAME/model, on the first rank, once
    training has freed its memory. If that fails, the run has ended well all the same."""
    if os.environ.get("RANK", "0") != "0":
        return
    sp.init(None)
    torch.cuda.empty_cache()
    try:
        sample.write(
            Path("runs") / options.name, options.sample, chat=False, max_tokens=200, temperature=0.8
        )
    except (Exception, SystemExit) as error:
        print(f"no sample was written: {type(error).__name__}: {error}", flush=True)


def main():
    options = None
    importing.done()
    try:
        sys.stdout.reconfigure(errors="replace")  # an ASCII terminal shows what it can
        options = parse(sys.argv[1:], usage=__doc__.split("\n\n")[1])
        with nullcontext() if options.fast else fast.plain():
            if options.dry_run:
                dry_run(options, build_optimizer)
            elif options.rehearse:
                rehearse(options, train)
            else:
                ended = train(options)
                if ended and options.sample:
                    write_sample(options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        fail(error, options)


if __name__ == "__main__":
    main()
