"""Frozen experts: packed in MXFP4 as released, with low-rank adapters, or both.

The experts are nine tenths of the 20b's weights. Packed they take 4.25 bits each (see mxfp4.py). A
block's experts are unpacked when the block runs, and again in its backward, to bitwise the weights
that convert_hf.py would make of them. Adapters change x W into x W + (x A) B; the gradients of A
and B come from matmuls with the small rank r as one of their sizes.

The definition and its fast twin are a pair as those of model.py and fast.py are; so are the letters
in shapes.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import fast
from fast import faster, fused
from model import Experts, experts
from mxfp4 import GROUP, dequantize_mxfp4, packed_shapes

MATRICES = ("gate_up", "down")

# --------------------------------------------------------------------------------------------------
# One frozen matrix: weight (E, in, out), or packed: blocks (E, out, in/32, 16), scales (E, out,
# in/32); and its adapters a (E, in, r), b (E, r, out), or None


def merged(weight, scales, a, b, like):
    """W + A B (E, in, out), in the dtype of `like`."""
    if scales is not None:
        weight = dequantize_mxfp4(weight, scales).mT
    weight = weight.detach().to(like.dtype)
    return weight if a is None else weight + a @ b


def bordered(weight, scales, a, b, like):
    """W with A on its right and B below, (E, in + r, out + r). The corner is never read.

    A packed matrix is unpacked in its own order, (E, out, in), which is a matter of one kernel that
    reads and writes in sequence. Grouped matmuls take either order, about equally fast."""
    E, inputs, outputs = weight.shape if scales is None else unpacked_shape(weight)
    r = width(a)
    if scales is not None:
        whole = empty(E, outputs + r, inputs + r, like=like).mT
        unpack_(whole[:, :inputs, :outputs].mT, weight, scales)
    elif r:
        whole = empty(E, inputs + r, outputs + r, like=like)
        whole[:, :inputs, :outputs] = weight
    else:
        return weight
    if r:
        whole[:, :inputs, outputs:] = a
        whole[:, inputs:, :outputs] = b
    return whole


@fused
def unpack_(out, blocks, scales):
    out.copy_(dequantize_mxfp4(blocks, scales))  # exact in bf16


def unpacked_shape(blocks):
    experts, outputs, groups, _ = blocks.shape
    return experts, groups * GROUP, outputs


def width(factor):
    return 0 if factor is None else factor.shape[-1]


def empty(*shape, like):
    """Uninitialised memory in which each row begins at a multiple of 128 bytes."""
    *rows, columns = shape
    return like.new_empty(*rows, columns + -columns % (128 // like.element_size()))[..., :columns]


# --------------------------------------------------------------------------------------------------
# The experts' fast twin


@fused
def gather_(out, x, index):
    out.copy_(x[index])


@fused
def biased_swiglu_(out, h, bias, expert, limit):
    # __wrapped__: as written, so that the copy is part of its kernel
    out.copy_(fast.biased_swiglu.__wrapped__(h, bias, expert, limit))


def with_product_(rows, factor, ends):
    """rows (R, n + r), whose last r columns become the product of the others with each row's
    `factor` (E, n, r)."""
    if factor is not None:
        r = factor.shape[-1]
        rows[:, -r:] = fast.grouped_mm(rows[:, :-r], factor, offs=ends)
    return rows


def gathered(x, index, factor, ends):
    """[x, x factor] (R, n + r) of the rows x[index] (R, n)."""
    n = x.shape[1]
    rows = empty(len(index), n + width(factor), like=x)
    gather_(rows[:, :n], x, index)
    return with_product_(rows, factor, ends)


def opener(several, *matrix, like):
    """A function that returns the bordered matrix: the same one each time if it is used for several
    tiles, else a new one, which lives no longer than its use."""
    unpack = functools.partial(bordered, *matrix, like=like)
    return functools.cache(unpack) if several else unpack


class FrozenExpertsFunction(torch.autograd.Function):
    """Twin of frozen_experts, after fast.ExpertsFunction. Gradients go to x, routing and adapters.

    x W + (x A) B is one grouped matmul, [x, x A] with [W; B], so it is summed in fp32; its backward
    to x is another, [g, g B^T] with [W, A]^T. The gradients of A and B are x^T (g B^T) and
    (x A)^T g: no product is larger than r times the rows. What is packed is unpacked here, so
    autograd keeps it packed; with a single tile never two whole matrices exist at once."""

    @staticmethod
    def forward(
        ctx, x, chosen, routing, w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2, limit, keep
    ):
        ctx.limit, k, several = limit, chosen.shape[1], len(x) > fast.EXPERT_TOKENS
        two_f = bias1.shape[1]
        hidden, out = [], torch.empty_like(x)
        if fast.replaying():  # experts come last in a block: their output is not read, or it shows
            out.fill_(torch.nan)
        else:
            first = opener(several, w1, scales1, a1, b1, like=x)
            second = opener(several, w2, scales2, a2, b2, like=x)
            for tile, choice, share, result in fast.tiles(x, chosen, routing, out):
                order, expert, ends, where = fast.sort_by_expert(choice, len(w1))
                rows = gathered(tile, order // k, a1, ends)  # (R, C + r)
                h = fast.grouped_mm(rows, first()[..., :two_f], offs=ends)  # (R, 2F)
                a = empty(len(h), two_f // 2 + width(a2), like=h)
                biased_swiglu_(a[:, : two_f // 2], h, bias1, expert, limit)
                with_product_(a, a2, ends)  # (R, F + r)
                y = fast.grouped_mm(a, second()[..., : x.shape[1]], offs=ends)  # (R, C)
                result.copy_(fast.combine(y, where, share, bias2, choice))
                if keep:
                    hidden.append(h)
        saved = w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2
        ctx.save_for_backward(x, chosen, routing, *saved, *hidden)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, chosen, routing, *saved = ctx.saved_tensors
        w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2, *hidden = saved
        if torch.is_grad_enabled():  # create_graph=True
            inputs = x, chosen, routing, *saved[:10], ctx.limit
            return *fast.differentiable_gradients("frozen_experts", inputs, grad), None
        needs_x, _, needs_routing, *_ = ctx.needs_input_grad
        k, several = chosen.shape[1], len(x) > fast.EXPERT_TOKENS
        C, two_f = bias2.shape[1], bias1.shape[1]
        first = opener(several, w1, scales1, a1, b1, like=x)
        second = opener(several, w2, scales2, a2, b2, like=x)
        dx = torch.empty_like(x) if needs_x else None
        drouting = torch.empty_like(routing) if needs_routing else None
        totals = {}  # the gradients of the adapters, in fp32 if there are several tiles

        def add(name, rows, others):  # (n, R) x (R, m) -> (E, n, m)
            part = fast.grouped_mm(rows.t(), others, offs=ends)
            totals[name] = totals[name].float().add_(part) if name in totals else part

        for number, (tile, choice, share, g) in enumerate(fast.tiles(x, chosen, routing, grad)):
            tokens = slice(number * fast.EXPERT_TOKENS, number * fast.EXPERT_TOKENS + len(tile))
            order, expert, ends, where = fast.sort_by_expert(choice, len(w1))
            g_rows = gathered(g, order // k, None if b2 is None else b2.mT, ends)  # (R, C + r)
            da = fast.grouped_mm(g_rows, second()[:, : two_f // 2].mT, offs=ends)  # (R, F)
            rows, whole = gathered(tile, order // k, a1, ends), first()  # (R, C + r)
            h = hidden.pop(0) if hidden else fast.grouped_mm(rows, whole[..., :two_f], offs=ends)
            dh = empty(len(h), two_f + width(a1), like=h)  # (R, 2F + r)
            weighted_a, da_a = fast.biased_swiglu_backward_(
                h, bias1, expert, ctx.limit, da, share.flatten()[order], *dh[:, :two_f].chunk(2, -1)
            )
            del h, da
            with_product_(dh, None if b1 is None else b1.mT, ends)
            if needs_x:
                drows = fast.grouped_mm(dh, whole[:, :C].mT, offs=ends)  # (R, C)
                dx[tokens] = fast.gather_sum(drows, where)
            if needs_routing:
                drouting[tokens] = da_a[where] + (g @ bias2.t()).gather(1, choice)
            if a1 is not None:
                add("a1", rows[:, :C], dh[:, two_f:])
                add("b1", rows[:, C:], dh[:, :two_f])
            if a2 is not None:
                add("a2", weighted_a, g_rows[:, C:])
                add("b2", fast.grouped_mm(weighted_a, a2, offs=ends), g_rows[:, :C])
        of = {name: total.to(x.dtype) for name, total in totals.items()}.get
        first, second = (of("a1"), of("b1")), (of("a2"), of("b2"))
        return dx, None, drouting, None, None, *first, None, None, None, *second, None, None, None


def frozen_experts_twin(
    x, chosen, routing, w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2, limit
):
    if any(size * x.element_size() % 16 for size in (bias1.shape[1] // 2, bias2.shape[1])):
        return NotImplemented  # model.experts will run, and say why
    keep_hidden = torch.is_grad_enabled() and not fast.Recompute.current
    matrices = w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2
    return FrozenExpertsFunction.apply(x, chosen, routing, *matrices, limit, keep_hidden)


@faster(frozen_experts_twin)
def frozen_experts(
    x, chosen, routing, w1, scales1, a1, b1, bias1, w2, scales2, a2, b2, bias2, limit
):
    """model.experts with the matrices W + A B; with scales, W is packed. Frozen: gradients go to x,
    routing and adapters only."""
    first, second = merged(w1, scales1, a1, b1, x), merged(w2, scales2, a2, b2, x)
    return experts(x, chosen, routing, first, bias1.detach(), second, bias2.detach(), limit)


# --------------------------------------------------------------------------------------------------
# The module


class FrozenExperts(Experts):
    """Experts whose matrices are packed, or have adapters, or both: gate_up_lora_a (E, C, r),
    gate_up_lora_b (E, r, 2F), down_lora_a (E, F, r), down_lora_b (E, r, C)."""

    def compute(self, x, chosen, routing):
        inputs = [*self.matrix("gate_up"), self.gate_up_bias]
        inputs += [*self.matrix("down"), self.down_bias]
        if chosen.numel() < self.router.out_features and not torch.is_grad_enabled():
            # generation: a few tokens need few experts, and only those are unpacked
            used, chosen = chosen.unique(return_inverse=True)
            inputs = [None if each is None else each[used] for each in inputs]
        return frozen_experts(x, chosen, routing, *inputs, self.limit)

    def matrix(self, name):
        """(weight, None, A, B) or (blocks, scales, A, B), with A and B None without adapters.

        B is scaled. Ranks are padded with zeros to a multiple of 8, because grouped matmuls need
        rows of a multiple of 16 bytes."""
        if hasattr(self, f"{name}_weight_blocks"):
            frozen = self.packed(name)
        else:
            frozen = getattr(self, f"{name}_weight"), None
        if not hasattr(self, f"{name}_lora_a"):
            return *frozen, None, None
        a, b = getattr(self, f"{name}_lora_a"), self.lora_scale * getattr(self, f"{name}_lora_b")
        padding = -a.shape[-1] % 8
        return *frozen, F.pad(a, (0, padding)), F.pad(b, (0, 0, 0, padding))

    def packed(self, name):
        """The blocks (E, out, in/32, 16) and scales (E, out, in/32) of a matrix, whatever the dtype
        that carries them."""
        blocks, scales = (
            getattr(self, f"{name}_weight_{part}").view(torch.uint8)
            for part in ("blocks", "scales")
        )
        outputs = getattr(self, f"{name}_bias").shape[1]
        scales = scales.view(len(scales), outputs, -1)
        return blocks.view(*scales.shape, -1), scales


def pack(model, carrier=torch.uint8):
    """Give a model on the meta device room for packed experts in place of unpacked ones.

    FSDP of PyTorch 2.11 can shard floats only, and casts those that have not the dtype it computes
    in. For FSDP the bytes are carried in parameters (E, n) of that dtype, which it only moves."""
    for block in model.blocks:
        block.mlp.__class__ = FrozenExperts
        for name in MATRICES:
            weight = getattr(block.mlp, f"{name}_weight")
            E, inputs, outputs = weight.shape
            delattr(block.mlp, f"{name}_weight")
            for part, shape in packed_shapes(E, inputs, outputs).items():
                if carrier != torch.uint8:
                    shape = E, math.prod(shape[1:]) // carrier.itemsize
                packed = torch.empty(shape, dtype=carrier, device=weight.device)
                setattr(block.mlp, f"{name}_weight_{part}", nn.Parameter(packed, False))
    return model


@dataclass(frozen=True)
class Carried:
    """A packed tensor in a folder, as shards.Place, in the dtype that carries it."""

    place: object
    dtype: torch.dtype

    def __getitem__(self, entries):
        return self.place[entries].flatten(1).view(self.dtype)
