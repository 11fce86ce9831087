"""What makes a large model fit: Adam in ten bytes per parameter, gradients in memory that
activations can use too, layer inputs in host memory.

Training with an fp32 master copy and fp32 moments takes 16 bytes per parameter: weight 4, gradient
4, moments 8; for gpt-oss-20b 335 GB. `SplitAdamW` takes 10 and loses no update to the rounding of
weights: bf16 weight 2, the rest of the fp32 master 2, gradient 2, moments 4. The gradients of
several micro-batches are summed in bf16.
"""

import functools

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

import fast

# --------------------------------------------------------------------------------------------------
# Optimizer


def join(weight, rest):
    """bf16 weight, int16 rest -> the fp32 master that `split` made them from, to the last bit."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(master):
    """fp32 -> the nearest bf16, and the difference of their bits as int16. Ties round away from
    zero: rounded to even, the difference would not fit."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


def adamw(weight, rest, grad, m, v, lr, decay, correction1, correction2, beta1, beta2, eps):
    """One AdamW update (https://arxiv.org/abs/1711.05101), computed in fp32, in place, of a bf16
    weight whose master's low bits are `rest`; m and v are bf16. A correction is 1 - beta^step."""
    grad, master = grad.float(), join(weight, rest)
    new_m = m.float() * beta1 + grad * (1 - beta1)
    new_v = v.float() * beta2 + grad * grad * (1 - beta2)
    step = (new_m / correction1) / ((new_v / correction2).sqrt() + eps)
    new_weight, new_rest = split(master - lr * (step + decay * master))
    weight.copy_(new_weight)
    rest.copy_(new_rest)
    m.copy_(new_m)
    v.copy_(new_v)


def check_betas(beta1, beta2):
    """ValueError for betas whose updates of a moment are below bf16's resolution and get lost."""
    for name, beta in ("beta1", beta1), ("beta2", beta2):
        if beta > 0.99:
            raise ValueError(
                f"{name}={beta}: moments in bf16 follow 0.99 at most, and that roughly; "
                "lower it, or use optimizer=fp32"
            )


class SplitAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters, plain or DTensor, with an exact fp32 master: the parameter is its
    rounded upper half, and the state's `rest` is what the rounding removed. Moments are bf16: see
    check_betas."""

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        check_betas(*betas)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                    "rest": torch.zeros_like(p, dtype=torch.int16),
                }
        self.update = {"cpu": adamw}
        if any(p.device.type == "cuda" for p in self.state):
            # One kernel without temporaries. Autotuned, because the block size that the compiler
            # guesses is a fifth slower on some tensors.
            self.update["cuda"] = torch.compile(adamw, options={"max_autotune_pointwise": True})

    @staticmethod
    def vectors(t):
        """This rank's part of t as (n, 16) if 16 divides its size, else (n, 1). One kernel serves
        all sizes, and only a size known to be a multiple of 16 is read 16 bytes at a time."""
        t = t.to_local() if isinstance(t, DTensor) else t
        width = 16 if t.numel() % 16 == 0 else 1
        return t.view(t.numel() // width, width)

    @torch.no_grad()
    def step(self):
        # Numbers are passed as tensors, because the compiler specialises a kernel to each value of
        # a Python number. All are copied before the first kernel, because a copy to a GPU waits for
        # what runs there.
        updates, numbers = [], {}
        for i, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["step"] += 1
                steps = self.state[p]["step"].item()
                if (i, steps) not in numbers:
                    corrections = 1 - beta1**steps, 1 - beta2**steps
                    values = [group["lr"], group["weight_decay"], *corrections]
                    numbers[i, steps] = torch.tensor(values, device=p.device).unbind()
                updates.append((p, numbers[i, steps], (beta1, beta2, group["eps"])))
        for p, on_device, constants in updates:
            state = self.state[p]
            tensors = p, state["rest"], p.grad, state["exp_avg"], state["exp_avg_sq"]
            update = self.update[p.device.type]
            update(*(self.vectors(t) for t in tensors), *on_device, *constants)


# --------------------------------------------------------------------------------------------------
# Gradients


class ReduceScatter:
    """FSDP2's reduce-scatter for `module`, whose gradients live in the memory of the computing
    stream.

    PyTorch never reuses for one stream what another stream has freed. FSDP allocates gradients on a
    stream of its own, so in the next forward their memory could not hold activations: a GPU runs
    full and stalls, twice per step, while the allocator returns everything that is free to the
    driver. On two H200s this took a fifth of a step: docs/LOG.md, 2026-11-24.

    FSDP hands over and takes back gradients in the dtype they are kept in; the ranks' gradients are
    summed in `dtype`. Gradients in bf16 to be summed in fp32 are sent in bf16, half as many bytes,
    and added up here; between nodes that has not been timed. (FSDP can sum in fp32 by itself, but
    then makes the bf16 copy that is kept in its own stream's memory: on eight ranks 9 GiB lay
    reserved and unused.)

    What a rank receives lies in the computing stream's memory too, and lives as long as what it
    sends. FSDP drops that once the computing stream has waited for the exchange, so the memory of
    both can be reused immediately. (Memory that record_stream hands to a second stream is free only
    after an event, and the CPU, which runs ahead, asks for more meanwhile: a GPU ran full,
    docs/LOG.md, 2026-11-26.)

    For FSDPModule.set_custom_reduce_scatter; create it on the computing stream. FSDP's stream has
    just waited for that stream when it allocates, so memory that the computation freed is free. But
    torch.empty must not launch a kernel there, as it does with deterministic algorithms unless
    torch.utils.deterministic.fill_uninitialized_memory is off."""

    def __init__(self, module, device, dtype):
        self.module, self.dtype = module, dtype
        self.stream = torch.cuda.current_stream() if device.type == "cuda" else None

    def makes_the_gradient(self):
        """False if the output is added to the gradient of earlier micro-batches, and soon freed."""
        return next(p for p in self.module.parameters() if p.requires_grad).grad is None

    def allocate(self, size, *, dtype, device):
        with torch.cuda.stream(self.stream if self.makes_the_gradient() else None):
            x = torch.empty(size, dtype=dtype, device=device)
        if x.is_cuda:  # once freed, it is not reused before FSDP's stream is done with it
            x.record_stream(torch.cuda.current_stream())
        return x

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        if input_tensor.dtype == self.dtype:
            # reduce_scatter_tensor was its name before PyTorch 2.13
            run = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
            return run(output_tensor, input_tensor, op, group, async_op)
        assert op == dist.ReduceOp.SUM and not async_op  # as train.build_model has FSDP ask for it
        with torch.cuda.stream(self.stream):
            received = torch.empty_like(input_tensor)
        input_tensor.received = received  # so that both are dropped together
        dist.all_to_all_single(received, input_tensor, group=group)
        parts = received.view(dist.get_world_size(group), -1)
        torch.sum(parts, 0, out=output_tensor.view(-1))  # bf16 is added up in fp32, rounded once


# --------------------------------------------------------------------------------------------------
# Layer inputs in host memory


# Largest block input, in bytes, that is fetched early: while the block after it runs its backward.
# A larger one is fetched when it is needed, so the GPU holds one input less. The wait is short
# compared with the block's own time: at 50 GB/s, 1.5 % at 128K tokens of the 20b (by arithmetic).
LARGE_GPU_AHEAD = 2**30
AHEAD = LARGE_GPU_AHEAD  # in use; set from ahead() once the GPU is known


def ahead(gib):
    """AHEAD for a GPU with `gib` GiB: on a small one nothing is fetched early."""
    return 0 if fast.is_small(gib) else LARGE_GPU_AHEAD


# Elements copied at a time. PyTorch rounds pinned memory up to a power of two; this is one.
PIECE = 4 * 2**20


class HostMemory(saved_tensors_hooks):
    """`with HostMemory():` hidden states (B, S, C) that autograd saves for the backward wait in
    pinned host memory.

    For a model that recomputes its blocks, and so saves a block's input and little else. Copies run
    on a stream of their own: out while the next block computes, back one block before they are
    needed. torch.autograd.graph.save_on_cpu does the same but waits for each copy."""

    def __init__(self):
        super().__init__(self.pack, self.unpack)
        self.stream = copy_stream()
        self.host = []  # [(pieces in host memory, shape)] in the forward's order; None once used
        self.leaving = []  # [(source, event)] of copies to the host that may still run
        self.back = {}  # {index in host: (tensor on the GPU, event of its copy)}

    def pack(self, x):
        if not x.is_cuda or x.dim() != 3 or not x.is_floating_point():
            return x
        pieces = x.flatten().split(PIECE)
        host = [torch.empty(piece.shape, dtype=x.dtype, pin_memory=True) for piece in pieces]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for there, here in zip(host, pieces):
                there.copy_(here, non_blocking=True)
            self.leaving.append((pieces, self.stream.record_event()))
        if len(self.leaving) > 1:  # wait for the copy before this one; then its source is freed
            _, copied = self.leaving.pop(0)
            torch.cuda.current_stream().wait_event(copied)
        self.host.append((host, x.shape))
        return len(self.host) - 1

    def unpack(self, saved):
        if torch.is_tensor(saved):
            return saved
        if self.leaving:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.leaving.clear()
        self.fetch(saved)
        if sum(piece.nbytes for piece in self.host[saved][0]) <= AHEAD:
            self.fetch(saved - 1)  # the backward needs it next
        x, arrived = self.back.pop(saved)
        torch.cuda.current_stream().wait_event(arrived)
        self.host[saved] = None
        return x

    def fetch(self, saved):
        if saved < 0 or saved in self.back or self.host[saved] is None:
            return
        host, shape = self.host[saved]
        x = torch.empty(shape, dtype=host[0].dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())  # what used this memory before is done
        with torch.cuda.stream(self.stream):
            for there, here in zip(host, x.flatten().split(PIECE)):
                here.copy_(there, non_blocking=True)
            self.back[saved] = x, self.stream.record_event()


@functools.cache
def copy_stream():
    """One per process: PyTorch has 32 streams to give, and FSDP and NCCL use some of them."""
    return torch.cuda.Stream()
