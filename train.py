"""Train GPT-OSS: FSDP2 over all ranks, Ulysses over groups of them, in one flat script.

    torchrun --nproc_per_node 2 train.py configs/tiny.py                    # a laptop: about a minute, no download
    torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py --lr=1e-5    # the real thing; options follow as --name=value
    python train.py configs/tiny.py --sp=1                                  # one device
    python train.py --help                                                  # every option

A config file is Python that assigns options, `seq_len = 64 * 1024`; it is code, so run only those you trust.
A run lives in runs/NAME: config.json, metrics.jsonl, loss.png, states/ to resume from, model/ the trained weights.

Batches depend on the step alone, never on the number of ranks: the same run on 1, 2 or 8 ranks, at any sp, sees the same
tokens in the same order, and a resumed run goes on as if it had never stopped.
"""

import os

os.environ.setdefault(
    "PYTORCH_ALLOC_CONF", "expandable_segments:True"
)  # read when torch is imported; fewer holes in memory

import dataclasses
import json
import math
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import sample
import sp
from loop.budget import adds_in_bf16, arithmetic, dry_run, flops_of, peak_flops
from loop.guards import Stop, describe_bad_step, fail, hold, keep_pulse, meeting_point
from loop.log import Log, format_line, take_expert_load, watch_expert_load
from loop.memory import HostMemory, ReduceScatter, SplitAdamW
from loop.options import check_files, check_new, check_ranks, check_same_run, model_config, parse
from loop.states import States
from model import GPTOSS, IGNORED
from weights import COMPANIONS, HF_CONFIG, copy_companions, load_weights, save_weights

# ----------------------------------------------------------------------------------------------------------------------
# Ranks, model, optimizer


def start_ranks(options):
    """The process group, also for one rank. Returns the device, and the mesh over which FSDP shards: (replicas, ranks of
    one copy of the model), neighbours together."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    timeout, backend = timedelta(seconds=options.timeout), "nccl" if cuda else "gloo"
    dist.init_process_group(
        backend,
        timeout=timeout,
        device_id=device if cuda else None,
        **meeting_point(options.timeout),
    )
    keep_pulse()
    ranks = dist.get_world_size()
    sp.init(
        init_device_mesh(
            device.type, (ranks // options.sp, options.sp), mesh_dim_names=("batch", "sp")
        )["sp"]
    )
    return device, init_device_mesh(
        device.type,
        (options.replicas, ranks // options.replicas),
        mesh_dim_names=("replica", "shard"),
    )


def build_model(options, config, device, mesh, dtype):
    """The model: built without memory, sharded, given memory, filled; no rank ever holds all of it."""
    with torch.device("meta"):
        model = GPTOSS(config, options.recompute, options.keep_blocks)
    stored = torch.float32 if options.optimizer == "fp32" else torch.bfloat16
    in_bf16 = dtype == torch.bfloat16 and adds_in_bf16(mesh.size(), options.optimizer)
    reduce_dtype = torch.bfloat16 if in_bf16 else torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False
    )  # rotary tables: fp32
    mesh = mesh if options.replicas > 1 else mesh["shard"]
    model = model.to(stored)
    for module in [*model.blocks, model]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
        module.set_gradient_divide_factor(
            1.0
        )  # the loss is divided by the global count of targets: gradients just add up
        module.set_force_sum_reduction_for_comms(
            True
        )  # FSDP would ask for NCCL's scaled sum, which gloo does not have
        if (
            reduce_dtype == stored
        ):  # the sums are the gradients: let their memory serve the next forward
            module.set_custom_reduce_scatter(ReduceScatter(module, device))
    model.to_empty(device=device)
    if options.checkpoint:
        load_weights(model, options.checkpoint)
    else:
        model.init_weights(options.seed)
    return model


def build_optimizer(options, model):
    matrix = {
        n: n.endswith("weight") and not n.endswith("norm.weight")
        for n, _ in model.named_parameters()
    }
    groups = [
        {
            "params": [p for n, p in model.named_parameters() if matrix[n]],
            "weight_decay": options.weight_decay,
        },
        {"params": [p for n, p in model.named_parameters() if not matrix[n]], "weight_decay": 0.0},
    ]
    settings = {"lr": options.lr, "betas": (options.beta1, options.beta2)}
    if options.optimizer == "split":
        return SplitAdamW(groups, **settings)
    optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    for p in (
        model.parameters()
    ):  # now, not at the first step, so that a saved state has somewhere to go
        step, zeros = torch.zeros((), device=p.device), torch.zeros_like(p)
        optimizer.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return optimizer


def training_state(model, optimizer):
    """{name: DTensor} of all that a resumed run needs."""
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        tensors |= {
            f"{key}.{name}": value for key, value in optimizer.state[p].items() if key != "step"
        }
    return tensors


def gradient_norm_squared(model):
    """This rank's part of the squared norm of all gradients, fp32."""
    norms = [
        torch.linalg.vector_norm(p.grad.to_local(), dtype=torch.float32) for p in model.parameters()
    ]
    return torch.stack(norms).double().square().sum()


def learning_rate(options, step):
    """Linear warm-up, then half a cosine down to final_lr of the highest."""
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    return options.lr * (
        options.final_lr + (1 - options.final_lr) * (1 + math.cos(math.pi * done)) / 2
    )


# ----------------------------------------------------------------------------------------------------------------------
# Batches and losses


def my_rows(options, first, number):
    """The part of rows [first, first + number) that this rank's sequence-parallel group computes, a range a micro-batch."""
    groups = dist.get_world_size() // options.sp
    for start in range(first, first + number, groups * options.micro_batch):
        mine = start + dist.get_rank() // options.sp * options.micro_batch
        yield range(mine, mine + options.micro_batch)


def to_model(batch, device):
    """This rank's slice of whole rows: tokens, targets, and documents, or None where no row has a second one, because a
    plain causal mask has the fastest kernel."""
    tokens, targets, documents = batch
    return [
        x if x is None else x.to(device)
        for x in sp.shard(tokens, targets, documents if documents.any() else None)
    ]


def all_sum(*numbers, device):
    """Each number summed over all ranks."""
    total = torch.stack([torch.as_tensor(n, dtype=torch.float64, device=device) for n in numbers])
    dist.all_reduce(total)
    return total.tolist()


@torch.no_grad()
def evaluate(options, model, data, device):
    """Mean loss over the first eval_rows rows of `data`, all ranks together. Does not depend on the number of ranks."""
    last, rows = (
        min(options.eval_rows, data.sequences_per_epoch),
        dist.get_world_size() // options.sp * options.micro_batch,
    )
    loss = count = 0
    for mine in my_rows(options, 0, math.ceil(last / rows) * rows):
        tokens, targets, documents = data.batch(mine)
        targets[[i >= last for i in mine]] = IGNORED  # every rank runs as often as the others
        count += (targets != IGNORED).sum() / options.sp
        loss += model(
            *to_model((tokens, targets, documents), device), count=torch.ones((), device=device)
        )
    loss, count = all_sum(loss, count, device=device)
    return loss / max(count, 1)


# The run


def train(options):
    if options.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    torch._dynamo.config.fail_on_recompile_limit_hit = (
        True  # or FlexAttention would fall back to S x S in silence
    )
    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    config = model_config(options)
    check_ranks(options, config, ranks)
    data, held_out = check_files(options, config)
    folder = Path("runs") / options.name
    if first:
        hold(folder)
        check_new(options)  # again: who held it may have been another run of that name
    device, mesh = start_ranks(options)
    stop = Stop()

    # model, optimizer
    automatic = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, automatic if options.dtype == "auto" else options.dtype)
    start = time.perf_counter()
    model = build_model(options, config, device, mesh, dtype)
    source = f"from {options.checkpoint}" if options.checkpoint else "random"
    ready = f"weights {source}, {time.perf_counter() - start:.1f} s"
    optimizer = build_optimizer(options, model)
    watch_expert_load(model)

    # where to begin
    states, tensors = States(folder / "states", options.keep), training_state(model, optimizer)
    fixed = (
        "data",
        "seed",
        "seq_len",
        "batch_size",
        "long_documents",
        "optimizer",
    )  # what may not change when a run goes on
    identity = (
        dataclasses.asdict(config)
        | {name: getattr(options, name) for name in fixed}
        | {"tokens in data": data.tokens}
    )
    saved = (states.newest() if options.resume else None) or {
        "step": 0,
        "updates": 0,
        "identity": identity,
    }
    check_same_run(folder, saved["identity"], identity)
    if saved["step"]:
        states.load(saved["step"], tensors)
    step, updates, skipped = saved["step"], saved["updates"], 0
    for state in optimizer.state.values():
        state["step"].fill_(updates)
    if first:
        settings = dataclasses.asdict(options) | {"tokenizer": data.tokenizer}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    log = Log(options, folder, step)

    tokens_a_step, peak = options.batch_size * options.seq_len, peak_flops(device)
    log.say(arithmetic(options, config, sum(p.numel() for p in model.parameters()), ranks))
    log.say(data.describe())
    log.say(f"goes on after step {step - 1}" if step else ready)

    while step < options.steps:
        # the gradient of the mean over all counted targets of the step, whichever rank and micro-batch they are in
        start = time.perf_counter()
        batches = [
            data.batch(mine)
            for mine in my_rows(options, step * options.batch_size, options.batch_size)
        ]
        counted = (
            sum((targets != IGNORED).sum() for _, targets, _ in batches) / options.sp
        )  # all sp ranks count the same rows
        (count,) = all_sum(counted, device=device)
        loss, count = 0, torch.tensor(count, device=device)
        for batch in batches:
            with HostMemory() if options.offload else nullcontext():
                share = model(*to_model(batch, device), count=count)
            share.backward()
            loss += share.detach()
        flops = sum(flops_of(config, documents) for _, _, documents in batches) / options.sp
        squares = (
            gradient_norm_squared(model) / options.replicas
        )  # all replicas have the same gradients
        loss, norm, flops, asked_to_stop = all_sum(loss, squares, flops, stop.asked, device=device)
        norm = math.sqrt(norm)

        # the update
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        if math.isfinite(loss) and math.isfinite(norm):
            if options.grad_clip and norm > options.grad_clip:
                torch._foreach_mul_([p.grad for p in model.parameters()], options.grad_clip / norm)
            optimizer.step()
            updates, skipped = updates + 1, 0
        else:
            skipped += 1
            log.say(
                f"step {step}: loss {loss}, gradient norm {norm}: update skipped, {skipped} in a row"
            )
            if skipped == options.bad_steps:
                raise FloatingPointError(describe_bad_step(model, step, options))
        optimizer.zero_grad()

        # a line, and now and then a saved state and an evaluation
        values = {"step": step, "loss": loss, "grad_norm": norm, "lr": learning_rate(options, step)}
        values["expert_load"] = take_expert_load(model)  # waits for the GPU: the step ends here
        seconds = time.perf_counter() - start
        values |= {"ms": seconds * 1000, "tokens_per_s": tokens_a_step / seconds}
        values |= {
            "tokens_per_s_per_rank": tokens_a_step / seconds / ranks,
            "eta_s": seconds * (options.steps - step - 1),
        }
        if peak:
            values["mfu"] = flops / seconds / ranks / peak
        if device.type == "cuda":
            values["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            values["alloc_retries"] = torch.cuda.memory_stats()[
                "num_alloc_retries"
            ]  # so far; each stops the GPU for a while
        step += 1
        last = step == options.steps or asked_to_stop > 0
        if step % options.log_every == 0 or last:
            log.say(format_line(values))
        log.metrics(values)  # before the state: a step that is saved is in the log
        if (options.save_every and (step % options.save_every == 0 or last)) or asked_to_stop:
            stall = states.save(
                step, tensors, {"step": step, "updates": updates, "identity": identity}
            )
            log.say(f"saving the state after step {step - 1}, stalled {stall:.2f} s")
        if asked_to_stop and step < options.steps:
            break
        if held_out and options.eval_every and (step % options.eval_every == 0 or last):
            loss = evaluate(options, model, held_out, device)
            log.say(f"step {step - 1} | held out {loss:.4f}")
            log.metrics({"step": step - 1, "eval_loss": loss})

    # what remains
    def write_config(path):
        config.to_json(path)
        if options.checkpoint:
            copy_companions(Path(options.checkpoint), path.parent, (*COMPANIONS, HF_CONFIG))

    states.wait()
    if step < options.steps:
        log.say(f"asked to stop: --resume=true goes on after step {step - 1}")
    else:
        save_weights(model, folder / "model", dtype, write_config)
        log.say(f"weights are in {folder / 'model'}")
    log.plot()
    if options.sample and step == options.steps:
        sp.init(None)  # the first rank alone
        if first:
            sample.write(
                folder,
                options.sample,
                chat=False,
                max_tokens=options.sample_tokens,
                temperature=0.8,
                device=device,
            )
    dist.barrier()
    dist.destroy_process_group()


def main():
    options = None
    try:
        options = parse(sys.argv[1:], usage=__doc__.split("\n\n")[1])
        dry_run(options) if options.dry_run else train(options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        fail(error, options)


if __name__ == "__main__":
    main()
