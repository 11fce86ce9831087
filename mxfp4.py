"""MXFP4, packed and unpacked: 32 values share one scale, a power of two, and are four bits each: a sign and one of eight
magnitudes.

Reference: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

Letters in shapes: G groups of 32 values that share a scale
"""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where values are packed and unpacked

GROUP = 32
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
# A magnitude's code is the number of these that lie below it. A tie goes to the even code, so every second threshold is
# itself the first value of the upper code, and must stand one fp32 step lower.
THRESHOLDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
THRESHOLDS[1::2] = torch.nextafter(THRESHOLDS[1::2], torch.tensor(0.0))
# What each byte holds, two bf16 side by side, low nibble first, seen as one int32: one look-up unpacks both.
_values = MAGNITUDES + [-m for m in MAGNITUDES]
PAIRS = (
    torch.tensor([(_values[b & 15], _values[b >> 4]) for b in range(256)], dtype=torch.bfloat16)
    .view(torch.int32)
    .squeeze(1)
)
POWERS = (
    2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
).float()  # of each scale byte; 1 / POWERS[b] is POWERS[254 - b]
POWERS[255] = torch.nan  # so says the format; transformers makes infinity of it


def look_up(table, indices):
    """table[indices] for a uint8 tensor. index_select: an order of magnitude faster on a CPU than indexing by a tensor."""
    return table.to(indices.device).index_select(0, indices.flatten().int()).view(indices.shape)


def dequantize_mxfp4(blocks, scales):
    """uint8 blocks (..., G, 16) and scales (..., G) -> (..., 32 G) bf16, which holds every MXFP4 value exactly."""
    values = look_up(PAIRS, blocks.to(DEVICE)).view(torch.bfloat16)  # (..., G, 32)
    values *= look_up(POWERS.bfloat16(), scales.to(DEVICE)).unsqueeze(-1)
    return values.flatten(-2)


def quantize_mxfp4(weight):
    """(..., 32 G) of any float dtype -> uint8 blocks (..., G, 16), scales (..., G): the nearest value, ties to even.

    The scale is 2 ** (floor(log2(largest magnitude)) - 2), which puts the largest into [4, 8); above 6 it saturates.
    What came out of MXFP4 goes back without change: its values, that is, a group may find a smaller scale for them."""
    groups = weight.to(DEVICE).unflatten(-1, (-1, GROUP)).contiguous()  # (..., G, 32)
    magnitudes = groups.float().abs()
    largest = magnitudes.amax(-1)
    if not largest.isfinite().all():
        raise ValueError(
            "MXFP4 cannot hold infinite values or NaN: this checkpoint is broken, export an earlier one"
        )
    exponent = torch.frexp(largest).exponent - 1  # floor(log2), and exact, which log2 is not
    scales = torch.where(largest > 0, exponent - 2 + 127, 0).clamp(min=0).to(torch.uint8)
    magnitudes *= look_up(POWERS, 254 - scales).unsqueeze(-1)
    codes = torch.bucketize(magnitudes, THRESHOLDS.to(DEVICE), out_int32=True).to(torch.uint8)
    codes += groups.signbit().to(torch.uint8) * 8  # signbit: minus zero has a code of its own
    return codes[..., 0::2] + codes[..., 1::2] * 16, scales
