"""mxfp4.py against transformers, bit by bit, and against the format's definition in fp64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_folders import same_bits
from mxfp4 import dequantize_by_bits, dequantize_mxfp4, quantize_mxfp4

GRID = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # by code


@pytest.mark.parametrize(
    "way",
    ["look-up", "bits", pytest.param("compiled bits", marks=pytest.mark.slow)],  # a C++ compiler's
)
def test_dequantization_is_transformers_bit_by_bit(way):
    """Every byte of values under every scale, subnormal and infinite products among them; the last
    scale byte is NaN."""
    mxfp4 = pytest.importorskip(
        "transformers.integrations.mxfp4", reason="this transformers has no MXFP4"
    )
    blocks = (
        torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    )
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales)  # (1, in, out)
    unpack = dequantize_mxfp4 if way == "look-up" else dequantize_by_bits
    if way == "compiled bits":
        unpack = torch.compile(unpack, fullgraph=True)
    ours = unpack(blocks, scales).mT
    assert same_bits(ours[:, :, :255].contiguous(), theirs[:, :, :255].contiguous())
    assert ours[:, :, 255].isnan().all()
    # low nibble first: values 2 and 3 of a group are the nibbles of byte 1
    assert ours[0, 2, 130] == 0.5 * 2.0**3


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gpu_packs_and_unpacks_bit_by_bit_as_a_cpu(compiled):
    """Every byte under every scale, and random weights."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16).contiguous()
    unpack = torch.compile(dequantize_mxfp4, fullgraph=True) if compiled else dequantize_mxfp4
    found, expected = unpack(blocks.cuda(), scales.cuda()), dequantize_mxfp4(blocks, scales)
    assert found.is_cuda and same_bits(found[:255].cpu(), expected[:255])
    assert found[255].isnan().all()
    weight = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    for a, b in zip(quantize_mxfp4(weight.cuda()), quantize_mxfp4(weight)):
        assert a.is_cuda and same_bits(a.cpu(), b)


@settings(max_examples=100, deadline=None)
@given(st.binary(min_size=64, max_size=64), st.binary(min_size=4, max_size=4))
@example(bytes([1] * 64), bytes(4))  # the smallest values there are: no scale puts them into [4, 8)
def test_what_came_out_of_mxfp4_goes_back_unchanged(blocks, scales):
    blocks = torch.tensor(list(blocks), dtype=torch.uint8).view(4, 1, 16)
    # 6 * 2 ** 126 and more is beyond bf16
    scales = torch.tensor(list(scales), dtype=torch.uint8).clamp(max=252).view(4, 1)
    values = dequantize_mxfp4(blocks, scales)
    assert same_bits(dequantize_mxfp4(*quantize_mxfp4(values)), values)


@settings(max_examples=200, deadline=None)
@given(
    # any bits of fp32; up to 8: values of which few are large, and ties
    st.binary(min_size=128, max_size=128).map(lambda x: np.frombuffer(x, "<f4").tolist())
    | st.binary(min_size=64, max_size=64).map(
        lambda x: (8 * (np.frombuffer(x, "<i2") / 2**15) ** 3).tolist()
    )
    | st.binary(min_size=32, max_size=32).map(lambda x: (np.frombuffer(x, "i1") / 16).tolist()),
    st.integers(-20, 20),
)
@example([7.5, 3.5, 7.9] + [0.25] * 29, 0)  # the larger scale is better
@example([7.5] + [0.5] * 31, 0)  # the smaller one is, in spite of the value above 7
@example([7.5 * 2.0**125] * 32, 0)  # the larger one would make infinity in bf16
def test_quantization_takes_the_better_scale_and_the_nearest_value(values, shift):
    """Against all codes under both scales, in fp64: ties go to the even code and smaller scale."""
    weight = (torch.tensor(values, dtype=torch.float64) * 2.0**shift).float()
    weight = weight.nan_to_num(nan=1.0, posinf=3e38, neginf=-3e38)
    blocks, scales = quantize_mxfp4(weight)
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten().long()
    largest = weight.abs().max().item()
    floor = max(0, math.frexp(largest)[1] - 1 - 2 + 127) if largest else 0
    best = None
    for scale in (floor, floor + 1):
        scaled = (weight.double() / 2.0 ** (scale - 127)).abs()
        distance = (GRID[:8].double() - scaled[:, None]).abs()  # (32, 8)
        even_first = (
            distance * 4 + torch.tensor([0, 1] * 4) * distance.amin(-1, True).clamp(1e-9) * 1e-9
        )
        nearest = even_first.argmin(-1)
        error = (distance.amin(-1) * 2.0 ** (scale - floor)).square().sum().item()
        reaches = nearest.max() < 6 or scale < 253  # 4 * 2 ** 126 is beyond bf16
        if best is None or (reaches and error < best[0] * (1 - 1e-6)):
            best = error, scale, nearest
    error, scale, nearest = best
    rounded = dequantize_mxfp4(blocks, scales).double()
    assert rounded.isfinite().all()
    found = ((rounded - weight.double()) / 2.0 ** (floor - 127)).square().sum().item()
    assert found == pytest.approx(error, rel=1e-5, abs=1e-12)
    if scales.item() == scale:
        assert torch.equal(codes % 8, nearest)
    assert torch.equal(codes >= 8, weight.signbit())


def test_the_better_scale_has_less_error_on_normal_weights():
    weight = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).view(-1, 32)
    blocks, scales = quantize_mxfp4(weight)
    error = (dequantize_mxfp4(blocks, scales).view_as(weight) - weight).norm() / weight.norm()
    floor = torch.frexp(weight.abs().amax(-1)).exponent - 3  # the format's own choice
    scaled = weight.abs() / torch.exp2(floor.float())[:, None]
    rounded = GRID[(GRID[:8] - scaled[..., None]).abs().argmin(-1)]
    before = ((rounded - scaled) * torch.exp2(floor.float())[:, None]).norm() / weight.norm()
    print(f"relative error {error:.4f}, with the smaller scale always {before:.4f}")
    assert error < 0.985 * before
    larger = (scales[:, 0].int() - 127 - floor).bool()
    assert 0.02 < larger.float().mean() < 0.5, "both scales are chosen"


def test_ties_at_every_threshold():
    """Values halfway between two of the grid, under a 6 that fixes the scale to 1."""
    halfway = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    weight = torch.cat([torch.tensor([6.0]), halfway, -halfway, torch.zeros(17)])
    rounded = dequantize_mxfp4(*quantize_mxfp4(weight)).cpu()
    assert rounded[1:8].tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert rounded[8:15].tolist() == [0, -1, -1, -2, -2, -4, -4]
