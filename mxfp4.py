"""MXFP4, packed and unpacked: 32 values of four bits each, a sign and one of eight magnitudes,
share one scale, a power of two.

Packed, a matrix (..., in) is two uint8 tensors: blocks (..., in / 32, 16), two values a byte with
the low nibble first, and scales (..., in / 32), exponents plus 127. Everything runs on the device
of its inputs and returns there.

Reference: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

Letters in shapes: G groups of 32 values that share a scale
"""

from dataclasses import dataclass

import torch

GROUP = 32
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by code
# A magnitude's code is the number of these that lie below it. A tie goes to the even code, so every
# second threshold is itself the first value of the upper code and must stand one fp32 step lower.
THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
THRESHOLDS[1::2] = torch.nextafter(THRESHOLDS[1::2], torch.tensor(0.0))
# The two bf16 values in each byte, low nibble first, seen as one int32: one look-up unpacks both.
_values = torch.cat([MAGNITUDES, -MAGNITUDES]).bfloat16()
PAIRS = torch.stack([_values.repeat(16), _values.repeat_interleave(16)], -1).view(torch.int32)[:, 0]
# What each scale byte multiplies by. 1 / POWERS[b] is POWERS[254 - b]. The last byte is NaN, says
# the format; transformers makes infinity of it.
POWERS = (2.0 ** (torch.arange(256, dtype=torch.float64) - 127)).float()
POWERS[255] = torch.nan


def packed_shapes(experts, inputs, outputs):
    """The shapes of the blocks and scales of a matrix (E, in, out). ValueError for inputs that are
    no multiple of GROUP."""
    if inputs % GROUP:
        raise ValueError(
            f"MXFP4 needs a multiple of {GROUP} inputs, and an expert matrix has {inputs}: keep "
            "experts in bf16 (train.py with --frozen=bf16, an export without --mxfp4)"
        )
    groups = experts, outputs, inputs // GROUP
    return {"blocks": (*groups, GROUP // 2), "scales": groups}


def look_up(table, indices):
    """table[indices] for a uint8 tensor, on its device. On a CPU index_select is an order of
    magnitude faster than indexing by a tensor."""
    return table.to(indices.device).index_select(0, indices.flatten().int()).view(indices.shape)


def dequantize_mxfp4(blocks, scales):
    """uint8 blocks (..., G, 16) and scales (..., G) -> bf16 (..., 32 G), which is exact: bf16 holds
    every MXFP4 value up to its own largest."""
    if not blocks.is_cpu:
        return dequantize_by_bits(blocks, scales)
    values = look_up(PAIRS, blocks).view(torch.bfloat16)  # (..., G, 32)
    values *= look_up(POWERS.bfloat16(), scales).unsqueeze(-1)
    return values.flatten(-2)


def dequantize_by_bits(blocks, scales):
    """The same by arithmetic on bf16's bits: sign, 8 bits of exponent, 7 of mantissa. No table has
    to be on the device and the compiler makes one kernel of it. On a CPU, uncompiled, it is four
    times slower than the look-up."""
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)  # (..., G, 32)
    code = (codes & 7).to(torch.int16)  # two bits of exponent, one of mantissa; 1 is subnormal: 0.5
    bits = torch.where(code > 1, (126 << 7) + (code << 6), code * (126 << 7))
    # the sign, as a bit too: a compiled -values has no minus zero on a GPU
    values = torch.where(codes > 7, bits | -0x8000, bits).view(torch.bfloat16)
    exponent = scales.to(torch.int16)
    bits = torch.where(exponent == 255, 0x7FC0, exponent << 7)  # NaN, or a mantissa of zero
    bits = torch.where(exponent == 0, 0x40, bits)  # 2 ** -127 is subnormal in bf16
    return (values * bits.to(torch.int16).view(torch.bfloat16).unsqueeze(-1)).flatten(-2)


def quantize_mxfp4(weight):
    """(..., 32 G) of any float dtype -> uint8 blocks (..., G, 16), scales (..., G): each value goes
    to the nearest, ties to the even code, under the better of two scales.

    The smaller scale puts a group's largest magnitude into [4, 8), where values above 6 saturate;
    the larger is twice that. Values that came out of MXFP4 go back unchanged: the smaller scale
    holds them exactly, though a group may find a smaller scale than it had. ValueError for NaN and
    infinity."""
    groups = weight.contiguous().unflatten(-1, (-1, GROUP))  # (..., G, 32)
    magnitudes = groups.float().abs()
    largest = magnitudes.amax(-1)  # (..., G)
    if not largest.isfinite().all():
        raise ValueError(
            "MXFP4 cannot hold infinite values or NaN: this checkpoint is broken, export an "
            "earlier one"
        )
    exponent = torch.frexp(largest).exponent - 1  # floor(log2), and exact, which log2 is not
    scales = torch.where(largest > 0, exponent - 2 + 127, 0).clamp(min=0).to(torch.uint8)
    magnitudes *= look_up(POWERS, 254 - scales).unsqueeze(-1)
    codes = nearest(magnitudes)
    # In units of the smaller scale the larger one offers 0, 1, 2, 3, 4, 6, 8, 12: it is nearer for
    # values above 7 only. Beyond 252 its 4 is infinite in bf16.
    above = (magnitudes.amax(-1) > 7) & (scales < 252)
    x, small, large = magnitudes[above], codes[above], nearest(magnitudes[above] / 2)
    better = error(x, look_up(MAGNITUDES, small)) > error(x, 2 * look_up(MAGNITUDES, large))
    codes[above] = torch.where(better.unsqueeze(-1), large, small)
    scales[above] += better.to(torch.uint8)
    codes += groups.signbit().to(torch.uint8) * 8  # signbit: minus zero has a code of its own
    return codes[..., 0::2] + codes[..., 1::2] * 16, scales


def nearest(magnitudes):
    """The codes, uint8, of the nearest of MAGNITUDES."""
    thresholds = THRESHOLDS.to(magnitudes.device)
    return torch.bucketize(magnitudes, thresholds, out_int32=True).to(torch.uint8)


def error(x, rounded):
    return (x - rounded).square().sum(-1)


@dataclass(frozen=True)
class Unpacked:
    """A matrix (E, in, out) in bf16 that a folder holds packed, as shards.Place shows one that it
    holds whole. `blocks` (E, out, in / 32, 16) and `scales` (E, out, in / 32) are Places."""

    blocks: object
    scales: object
    dtype: torch.dtype = torch.bfloat16

    @property
    def shape(self):
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * GROUP, outputs

    def __getitem__(self, entries):
        return dequantize_mxfp4(self.blocks[entries], self.scales[entries]).mT.contiguous()


def unpacked(places):
    """`places` {name: Place} with an Unpacked X for each pair X_blocks, X_scales that fits."""
    found = dict(places)
    for name in [name.removesuffix("_blocks") for name in places if name.endswith("_blocks")]:
        blocks, scales = places[f"{name}_blocks"], places.get(f"{name}_scales")
        if blocks and scales and blocks.shape == (*scales.shape, GROUP // 2):
            del found[f"{name}_blocks"], found[f"{name}_scales"]
            found[name] = Unpacked(blocks, scales)
    return found
