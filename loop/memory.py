"""What makes a large model fit: Adam in ten bytes a parameter, gradients in memory that activations can use too, layer inputs in
host memory, and the arithmetic before a run.

Training with an fp32 master copy and fp32 moments takes 16 bytes a parameter: weight 4, gradient 4, moments 8. For gpt-oss-20b
that is 335 GB. `SplitAdamW` takes 10 and loses no update to the rounding of weights: 2 bf16 weight, 2 the rest of the fp32 master,
2 gradient, 4 moments. The gradients of several micro-batches add up in bf16.
"""

import functools

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

# ----------------------------------------------------------------------------------------------------------------------
# Optimizer


def join(weight, rest):
    """bf16 weight and int16 rest -> the fp32 master that `split` made them from, to the last bit."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split(master):
    """fp32 -> the nearest bf16, and the difference of their bits as int16. A tie rounds away from zero, or it would not fit."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.short().view(torch.bfloat16), (bits - (high << 16)).short()


def adamw(weight, rest, grad, m, v, lr, decay, correction1, correction2, beta1, beta2, eps):
    """One AdamW update, in fp32, of a bf16 weight whose master's low bits are `rest`; m and v are bf16. All in place.

    https://arxiv.org/abs/1711.05101. The corrections are 1 - beta^step."""
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
    """ValueError for betas that change a moment by less than bf16's resolution, so that it stands still."""
    for name, beta in ("beta1", beta1), ("beta2", beta2):
        if beta > 0.99:
            raise ValueError(
                f"{name}={beta}: moments in bf16 follow at most 0.99, and that roughly; lower it, or use optimizer=fp32"
            )


class SplitAdamW(torch.optim.Optimizer):
    """AdamW for bf16 parameters, plain or DTensor, with an exact fp32 master: the parameter is its upper half, rounded, and
    the state's `rest` what the rounding took away. Moments in bf16: check_betas."""

    def __init__(self, params, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
        check_betas(*betas)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        for group in self.param_groups:
            for p in group["params"]:
                m, v, rest = (
                    torch.zeros_like(p),
                    torch.zeros_like(p),
                    torch.zeros_like(p, dtype=torch.int16),
                )
                self.state[p] = {
                    "step": torch.zeros(()),
                    "exp_avg": m,
                    "exp_avg_sq": v,
                    "rest": rest,
                }
        # on a GPU one kernel, no temporaries; the block size that the compiler would guess is a fifth slower on some tensors
        self.update = {
            "cpu": adamw,
            "cuda": torch.compile(adamw, options={"max_autotune_pointwise": True}),
        }

    @staticmethod
    def rows(t):
        """This rank's part of t, as rows of 16 where it can be. One kernel serves all sizes, and unless it knows that they are
        multiples of 16 it reads two bytes at a time instead of sixteen."""
        t = t.to_local() if isinstance(t, DTensor) else t
        width = 16 if t.numel() % 16 == 0 else 1
        return t.view(t.numel() // width, width)

    @torch.no_grad()
    def step(self):
        # Numbers are tensors, because the compiler makes a kernel for each value of a plain number; and all of them are there
        # before the first kernel runs, because copying one to a GPU waits for what runs there.
        updates, numbers = [], {}
        for i, group in enumerate(self.param_groups):
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["step"] += 1
                steps = self.state[p]["step"].item()
                if (i, steps) not in numbers:
                    values = [
                        group["lr"],
                        group["weight_decay"],
                        1 - beta1**steps,
                        1 - beta2**steps,
                    ]
                    numbers[i, steps] = torch.tensor(values, device=p.device).unbind()
                updates.append((p, numbers[i, steps], (beta1, beta2, group["eps"])))
        for p, on_device, constants in updates:
            state = self.state[p]
            tensors = [
                self.rows(t)
                for t in (p, state["rest"], p.grad, state["exp_avg"], state["exp_avg_sq"])
            ]
            self.update[p.device.type](*tensors, *on_device, *constants)


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


class ReduceScatter:
    """FSDP2's reduce-scatter for `module`, but the gradients it makes live in the memory of the stream that computes.

    PyTorch never gives memory that one stream has freed to another. FSDP asks for the gradients on a stream of its own, so
    in the next forward their memory could not hold activations: a GPU runs full, and waits while the allocator hands everything
    that is free back to the driver, twice a step. Seen on two H200s, where it took a fifth of a step: docs/LOG.md, 2026-11-24.

    For FSDPModule.set_custom_reduce_scatter. Made on the stream that will compute. FSDP's stream has just waited for that
    one when it asks, so memory that the computation freed is free; but torch.empty may run no kernel there, as it does with
    deterministic algorithms unless torch.utils.deterministic.fill_uninitialized_memory is off."""

    def __init__(self, module, device):
        self.module, self.stream = (
            module,
            torch.cuda.current_stream() if device.type == "cuda" else None,
        )

    def makes_the_gradient(self):
        """Or something that is added to the gradient of earlier micro-batches, and soon freed."""
        return next(self.module.parameters()).grad is None

    def allocate(self, size, *, dtype, device):
        with torch.cuda.stream(self.stream if self.makes_the_gradient() else None):
            x = torch.empty(size, dtype=dtype, device=device)
        if x.is_cuda:
            x.record_stream(
                torch.cuda.current_stream()
            )  # once freed it is not used again before FSDP's stream is done with it
        return x

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        reduce_scatter = (
            getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        )  # its name before PyTorch 2.13
        return reduce_scatter(output_tensor, input_tensor, op, group, async_op)


# ----------------------------------------------------------------------------------------------------------------------
# Layer inputs in host memory


PIECE = (
    4 * 2**20
)  # numbers copied at a time: PyTorch rounds a block of pinned memory up to a power of two, and this is one


class HostMemory(saved_tensors_hooks):
    """`with HostMemory():` what autograd keeps of hidden states (B, S, C) for the backward waits in pinned host memory.

    For a model that recomputes its blocks, and so keeps a block's input and little else. Copies run on a stream of their own:
    out while the next block computes, back one block before they are needed. torch.autograd.graph.save_on_cpu does the same
    but waits for each copy."""

    def __init__(self):
        super().__init__(self.pack, self.unpack)
        self.stream = copy_stream()
        self.host, self.leaving, self.back = (
            [],
            [],
            {},
        )  # in host memory, in the forward's order; on their way there, and back

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
        if (
            len(self.leaving) > 1
        ):  # the computation waits for the copy before this one, whose source then is free
            _, copied = self.leaving.pop(0)
            torch.cuda.current_stream().wait_event(copied)
        self.host.append((host, x.shape))
        return len(self.host) - 1

    def unpack(self, kept):
        if torch.is_tensor(kept):
            return kept
        if self.leaving:
            torch.cuda.current_stream().wait_stream(self.stream)
            self.leaving.clear()
        self.fetch(kept)
        self.fetch(kept - 1)
        x, arrived = self.back.pop(kept)
        torch.cuda.current_stream().wait_event(arrived)
        self.host[kept] = None
        return x

    def fetch(self, kept):
        if kept < 0 or kept in self.back or self.host[kept] is None:
            return
        host, shape = self.host[kept]
        x = torch.empty(shape, dtype=host[0].dtype, device="cuda")
        self.stream.wait_stream(torch.cuda.current_stream())  # what used this memory before is done
        with torch.cuda.stream(self.stream):
            for there, here in zip(host, x.flatten().split(PIECE)):
                here.copy_(there, non_blocking=True)
            self.back[kept] = x, self.stream.record_event()


@functools.cache
def copy_stream():
    """One for the process: PyTorch has 32 to hand out, some of them to FSDP and NCCL."""
    return torch.cuda.Stream()
