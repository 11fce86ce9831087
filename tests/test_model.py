"""model.py on a CPU: against transformers' GPT-OSS in fp32, as it runs and as it is defined."""

import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import fast
import model as model_module
from common import (
    assert_all_close,
    attention_inputs,
    attention_without_sinks,
    batch,
    gradients,
    hugging_face_config,
    hugging_face_gradients,
    noise_,
    packed,
    relative,
    tiny_config,
    twins,
)
from flash import block_mask
from loop.budget import flops_per_token
from model import GPTOSS, IGNORED, GPTOSSConfig, apply_sinks, dense_attention, rope_tables

# --------------------------------------------------------------------------------------------------
# Against transformers


CASES = {  # name: (changes to tiny_config, B, S)
    "window in sequence": ({}, 2, 29),
    "window past sequence": (
        {"sliding_window": 64, "num_key_value_heads": 6, "hidden_size": 24},
        3,
        13,
    ),
    "window of one, one kv head": (
        {"sliding_window": 1, "num_key_value_heads": 1, "num_hidden_layers": 4},
        1,
        37,
    ),
    "every expert": (
        {"experts_per_token": 5, "intermediate_size": 20, "head_dim": 2, "swiglu_limit": 0.3},
        2,
        17,
    ),
    "one expert each": (
        {"experts_per_token": 1, "num_experts": 9, "num_key_value_heads": 2, "hidden_size": 48},
        1,
        101,
    ),
    "no yarn": ({"rope_scaling_factor": 1.0, "num_hidden_layers": 2, "head_dim": 12}, 3, 1),
    "sizes that are no multiple of anything": ({"hidden_size": 22, "intermediate_size": 13}, 2, 23),
    "hidden 130, intermediate 66": ({"hidden_size": 130, "intermediate_size": 66}, 1, 19),
}


def compare_gradients(ours, theirs, tokens, targets):
    """Loss and the gradient of every parameter, with part of the targets masked."""
    loss = ours(tokens, targets)
    expected = F.cross_entropy(
        theirs(tokens).logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED
    )
    loss.backward()
    expected.backward()
    assert relative(loss, expected) <= 1e-6
    assert_all_close(gradients(ours), hugging_face_gradients(theirs), 1e-5)


@pytest.mark.parametrize("as_defined", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients(case, as_defined):
    changes, B, S = CASES[case]
    ours, theirs = twins(tiny_config(**changes), seed=len(case))
    tokens, targets = batch(ours.config, B, S)
    if S == 1:
        targets = tokens  # a single row: one that counts
    with fast.plain() if as_defined else nullcontext():
        logits, expected = ours(tokens), theirs(tokens).logits
        assert 0.3 < expected.std() < 3
        assert (logits - expected).abs().max() <= 1e-5
        compare_gradients(ours, theirs, tokens, targets)


@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
@pytest.mark.parametrize("recompute", ["none", "attention", "all"])
def test_gradients_recomputed_and_tiled(recompute, tiled, monkeypatch):
    if tiled:  # no size divides the 58 rows; the last tile has fewer rows than there are experts
        monkeypatch.setattr(fast, "EXPERT_TOKENS", 11)
        monkeypatch.setattr(fast, "LOSS_TOKENS", 7)
    ours, theirs = twins(tiny_config(), seed=3, recompute=recompute)
    compare_gradients(ours, theirs, *batch(ours.config, 2, 29))


@pytest.mark.parametrize("loss_rows", [2048, 5])
def test_logprobs(loss_rows, monkeypatch):
    monkeypatch.setattr(fast, "LOSS_TOKENS", loss_rows)
    ours, theirs = twins(tiny_config(), seed=4)
    tokens, targets = batch(ours.config, 3, 19)
    cotangents = torch.randn(3, 19, generator=torch.Generator().manual_seed(5))
    logprobs = ours.logprobs(tokens, targets)
    counted = targets != IGNORED
    expected = (
        theirs(tokens).logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        * counted
    )
    assert logprobs.dtype == torch.float32
    assert (logprobs[~counted] == 0).all()
    assert (logprobs - expected).abs().max() <= 1e-5
    logprobs.backward(cotangents)
    expected.backward(cotangents)
    assert_all_close(gradients(ours), hugging_face_gradients(theirs), 1e-5)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_packed_documents_equal_separate_runs(recompute):
    """transformers sees each document alone, from position 0: rotary positions are relative."""
    ours, theirs = twins(tiny_config(), seed=6, recompute=recompute)
    tokens, targets = batch(ours.config, 2, 31)
    lengths = [9, 1, 14, 7], [2, 29]
    documents = torch.stack(
        [packed(lengths[0], [5, 2, 9, 0]), packed(lengths[1], [2, 2**40])]
    )  # in no order
    logits = ours(tokens, documents=documents)
    loss = ours(tokens, targets, documents)
    alone = [
        theirs(document[None]).logits[0]
        for row, cut in zip(tokens, lengths)
        for document in row.split(cut)
    ]
    expected = torch.cat(alone).view_as(logits)
    assert (logits - expected).abs().max() <= 1e-5
    assert (
        relative(
            ours.logprobs(tokens, targets, documents).sum() / (targets != IGNORED).sum(), -loss
        )
        <= 1e-6
    )
    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), targets.flatten(), ignore_index=IGNORED).backward()
    assert_all_close(gradients(ours), hugging_face_gradients(theirs), 1e-5)


def swapped_pairs(x, cos, sin):
    """Rotary positions that turn neighbouring dimensions."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def unweighed_bias(y, where, gates, bias, chosen):
    return (y[where] * gates[..., None]).sum(1) + bias[chosen].sum(1)


def no_sinks(q, k, v, sinks, **mask):
    return dense_attention(q, k, v, torch.full_like(sinks, float("-inf")), **mask)


def interleaved_swiglu(h, limit):
    gate, up = h[..., ::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def biased_interleaved_swiglu(h, bias, expert, limit):
    return interleaved_swiglu(h + bias[expert], limit)


MISTAKES = [  # where, what, the mistake
    (model_module, "dense_attention", no_sinks),
    (model_module, "rotate", swapped_pairs),
    (model_module, "swiglu", interleaved_swiglu),
    (fast, "combine", unweighed_bias),
    (fast, "biased_swiglu", biased_interleaved_swiglu),
    (None, "sliding_window", 8),
    (None, "swiglu_limit", 7.0),
    (None, "rms_norm_eps", 1e-2),
]


@pytest.mark.parametrize("room, name, wrong", MISTAKES, ids=[name for _, name, _ in MISTAKES])
def test_comparison_sees(room, name, wrong, monkeypatch):
    """Each of these mistakes makes the comparison with transformers fail by far."""
    ours, theirs = twins(tiny_config())
    if room is None:
        parameters = ours.state_dict()
        ours = GPTOSS(replace(ours.config, **{name: wrong}))
        ours.load_state_dict(parameters)
    else:
        monkeypatch.setattr(room, name, wrong)
    tokens, _ = batch(ours.config, 2, 29)
    with torch.no_grad(), fast.plain() if room is model_module else nullcontext():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() > 1e-3


# --------------------------------------------------------------------------------------------------
# Rotary positions and arithmetic

POSITIONS = torch.tensor([0, 1, 2, 127, 4095, 4096, 65535, 65536, 131070, 131071])


def hugging_face_tables(**changes):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    cos, sin = GptOssRotaryEmbedding(hugging_face_config(GPTOSSConfig(), **changes))(
        torch.ones(1), POSITIONS[None]
    )
    return cos[0], sin[0]


def table_error(expected):
    return max(
        (ours - theirs).abs().max().item()
        for ours, theirs in zip(rope_tables(GPTOSSConfig(), POSITIONS), expected)
    )


def test_rotary_tables_of_the_real_model():
    """1e-2 at position 131071 is the last bit of a frequency; a ramp with rounded ends is off by
    whole turns."""
    pytest.importorskip("transformers", reason="transformers is the reference")
    assert table_error(hugging_face_tables()) <= 1e-2
    assert table_error(hugging_face_tables(truncate=True)) > 1


def test_yarn_ramp_of_the_real_model():
    """The ends of the ramp, read off the tables: between them it is a straight line."""
    config = GPTOSSConfig()
    cos, sin = (
        table[0].double() for table in rope_tables(config, torch.ones(1, dtype=torch.int64))
    )
    assert torch.hypot(cos, sin) == pytest.approx(
        torch.full((32,), 1.3465736, dtype=torch.float64), abs=2e-7
    )
    extrapolated = config.rope_theta ** -(torch.arange(32, dtype=torch.float64) / 32)
    ramp = (1 - torch.atan2(sin, cos) / extrapolated) / (1 - 1 / config.rope_scaling_factor)
    assert ramp[:9] == pytest.approx(torch.zeros(9, dtype=torch.float64), abs=1e-5)
    assert ramp[18:] == pytest.approx(torch.ones(14, dtype=torch.float64), abs=1e-5)
    slope = (ramp[17] - ramp[9]) / 8
    low, high = 9 - ramp[9] / slope, 9 + (1 - ramp[9]) / slope
    assert (low, high) == (pytest.approx(8.0928, abs=2e-4), pytest.approx(17.3980, abs=2e-4))


@pytest.mark.parametrize(
    "config, total",
    [(GPTOSSConfig.gpt_oss_20b(), 20_914_757_184), (GPTOSSConfig.gpt_oss_120b(), 116_829_156_672)],
)
def test_parameter_totals(config, total):
    with torch.device("meta"):
        model = GPTOSS(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_flops_per_token():
    config = GPTOSSConfig()
    for k, giga in {8: 24.1, 32: 31.4, 64: 41.0, 128: 60.4, 256: 99.0}.items():
        assert flops_per_token(config, k * 1024) / 1e9 == pytest.approx(giga, abs=0.05)
    tiny = tiny_config()
    for S in (3, 29):  # window 7: longer and shorter than the sequence; layers 0 and 2 slide
        pairs = sum(2 * min(i + 1, 7) + i + 1 for i in range(S))
        matrices = 3 * (20 * (6 + 6) * 8 + 48 * 20 + 20 * 5 + 2 * 3 * 20 * 12) + 20 * 61
        assert flops_per_token(tiny, S) == pytest.approx(6 * matrices + 12 * 48 * pairs / S)


# --------------------------------------------------------------------------------------------------
# Attention and its sinks


@pytest.mark.parametrize("detached", [False, True])
def test_sinks_on_the_logsumexp_equal_sinks_as_a_column(detached):
    """Outputs and gradients. With lse detached dq and dk are wrong and everything else is right."""
    inputs, grad = attention_inputs()
    q, k, v, sinks = inputs
    expected = dense_attention(q, k, v, sinks)
    out, lse = attention_without_sinks(q, k, v)
    actual = apply_sinks(out, lse.detach() if detached else lse, sinks).transpose(1, 2)
    assert relative(actual, expected) <= 1e-6  # its sigmoid is taken in fp32
    wanted = dict(zip(["q", "k", "v", "sinks"], torch.autograd.grad(expected, inputs, grad)))
    given = dict(zip(["q", "k", "v", "sinks"], torch.autograd.grad(actual, inputs, grad)))
    if detached:
        assert min(relative(given.pop(name), wanted.pop(name)) for name in "qk") > 1e-2
    assert_all_close(given, wanted, 1e-6)


def test_dense_attention_of_the_last_queries():
    """As generation calls it: fewer queries than keys."""
    (q, k, v, sinks), _ = attention_inputs()
    documents = torch.stack([packed([9, 14], [1, 0]), packed([21, 2], [0, 4])])
    for mask in (
        {},
        {"window": 5},
        {"documents": documents},
        {"window": 3, "documents": documents},
    ):
        torch.testing.assert_close(
            dense_attention(q[:, -4:], k, v, sinks, **mask),
            dense_attention(q, k, v, sinks, **mask)[:, -4:],
        )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_sink_attention_forward():
    """FlexAttention's plain forward on a CPU: shapes, masks, sinks. test_gpu.py has the rest."""
    q, k, v, sinks = (x.detach().float() for x in attention_inputs(S=300)[0])
    documents = torch.stack([packed([130, 170], [7, 3]), packed([299, 1], [0, 1])])
    for window in (None, 1, 64):
        for docs in (None, documents):
            out = model_module.flex_sink_attention(
                q, k, v, sinks, mask=block_mask(300, window, docs, q.device)
            )
            assert relative(out, dense_attention(q, k, v, sinks, window, docs)) <= 1e-6


# --------------------------------------------------------------------------------------------------
# Experts


def test_bf16():
    """The whole model in bf16 on a CPU, against the same weights in fp32."""
    config = tiny_config(
        hidden_size=24, intermediate_size=16
    )  # grouped matmuls in bf16 want sizes that 8 divides
    model, twin = noise_(GPTOSS(config)).bfloat16(), GPTOSS(config)
    twin.load_state_dict(model.state_dict())
    tokens, targets = batch(model.config, 2, 29)
    assert model(tokens).dtype == torch.bfloat16
    loss, expected = model(tokens, targets), twin(tokens, targets)
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    assert relative(loss, expected) <= 1e-2
    assert_all_close(gradients(model), gradients(twin), 0.2)


# --------------------------------------------------------------------------------------------------
# Loss


def test_all_targets_masked():
    model = noise_(GPTOSS(tiny_config()))
    tokens, targets = batch(model.config, 2, 9)
    loss = model(tokens, torch.full_like(targets, IGNORED))
    loss.backward()
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())
    assert (model.logprobs(tokens, torch.full_like(targets, IGNORED)) == 0).all()


def test_loss_of_parts_with_the_count_of_the_whole():
    model, twin = (noise_(GPTOSS(tiny_config())) for _ in range(2))
    tokens, targets = batch(model.config, 3, 9)
    targets[1] = IGNORED
    loss, count = twin(tokens, targets), (targets != IGNORED).sum()
    loss.backward()
    parts = [model(tokens[i : i + 1], targets[i : i + 1], count=count) for i in range(3)]
    sum(parts).backward()
    assert parts[1] == 0
    assert relative(sum(parts), loss) <= 1e-6
    assert_all_close(gradients(model), gradients(twin), 1e-5)


def test_loss_scales_and_needs_no_gradient():
    model, twin = (noise_(GPTOSS(tiny_config())) for _ in range(2))
    tokens, targets = batch(model.config, 2, 9)
    loss = model(tokens, targets)
    (3 * loss).backward()
    twin(tokens, targets).backward()
    assert_all_close(
        gradients(model), {name: 3 * gradient for name, gradient in gradients(twin).items()}, 1e-5
    )
    with torch.no_grad():
        assert relative(model(tokens, targets), loss) <= 1e-6


# --------------------------------------------------------------------------------------------------
# What users get wrong


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.full((1, 4), 61), r"vocab_size=61.*found 61"),
        (torch.tensor([[3, -2]]), r"vocab_size=61.*found -2"),
        (torch.zeros(1, 257, dtype=torch.int64), r"257 tokens.*max_position_embeddings=256"),
        (torch.zeros(2, 3), r"float32 \(2, 3\)"),
        (torch.zeros(2, 0, dtype=torch.int64), r"\(2, 0\)"),
        (torch.zeros(0, 2, dtype=torch.int64), r"\(0, 2\)"),
        (torch.zeros(3, dtype=torch.int64), r"\(B, S\).*\(3,\)"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), r"\(B, S\).*\(1, 2, 3\)"),
        (torch.tensor([[0, IGNORED, 1]]), r"tokens must lie in \[0, vocab_size=61\); found -100"),
    ],
)
def test_wrong_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        GPTOSS(tiny_config())(tokens)


@pytest.mark.parametrize(
    "targets, message",
    [
        (torch.zeros(2, 4, dtype=torch.int64), r"\(2, 3\).*\(2, 4\)"),
        (torch.full((2, 3), 61), r"vocab_size=61.*found 61"),
        (torch.tensor([[0, 1, 2], [0, -1, IGNORED]]), r"vocab_size=61.*-100.*found -1"),
        (torch.zeros(2, 3), r"float32"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "logprobs"])
def test_wrong_targets(call, targets, message):
    model = noise_(GPTOSS(tiny_config()))
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(torch.zeros(2, 3, dtype=torch.int64), targets)


@pytest.mark.parametrize("call", ["forward", "logprobs"])
def test_wrong_tokens_beside_targets(call):
    """The tokens are named where they are wrong, though no targets could match them."""
    model, flat = GPTOSS(tiny_config()), torch.zeros(16, dtype=torch.int64)
    for tokens, targets in ((flat, flat), (flat, flat[None]), (flat[None].float(), flat[None])):
        with pytest.raises(ValueError, match=r"^tokens must be .*\(B, S\), not empty; got torch"):
            getattr(model, call)(tokens, targets)
    with pytest.raises(ValueError, match=r"^targets .* the tokens' shape \(1, 16\); .* \(16,\)$"):
        getattr(model, call)(flat[None], flat)


def test_wrong_documents():
    with pytest.raises(ValueError, match=r"documents.*\(2, 2\)"):
        GPTOSS(tiny_config())(
            torch.zeros(2, 3, dtype=torch.int64), documents=torch.zeros(2, 2, dtype=torch.int64)
        )


def test_wrong_recompute():
    with pytest.raises(ValueError, match="recompute.*'attn'"):
        GPTOSS(tiny_config(), recompute="attn")


# --------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_experts": "32"}, "num_experts='32' must be a positive int"),
        ({"hidden_size": -1}, "hidden_size=-1 must be a positive int"),
        ({"sliding_window": 2.5}, "sliding_window=2.5 must be a positive int"),
        ({"vocab_size": True}, "vocab_size=True must be a positive int"),
        ({"rope_theta": None}, "rope_theta=None must be a positive float"),
        ({"rope_theta": math.nan}, "rope_theta=nan must be a positive float"),
        ({"num_experts": math.inf}, "num_experts=inf must be a positive int"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4.*num_attention_heads=6"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"experts_per_token": 6}, "experts_per_token=6.*num_experts=5"),
    ],
)
def test_config_values_that_are_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**change)


# --------------------------------------------------------------------------------------------------
# Initialisation and names


def materialised(config, dtype=torch.float32):
    """Built on the meta device, then given memory full of NaN."""
    with torch.device("meta"):
        model = GPTOSS(config)
    model = model.to(dtype).to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(math.nan)
    return model


def test_init_weights_sets_everything():
    config = tiny_config(hidden_size=64, num_experts=8)
    a, b, other = materialised(config), noise_(GPTOSS(config)), materialised(config)
    a.init_weights(seed=5)
    torch.rand(3)  # the global generator plays no part
    b.init_weights(seed=5)
    other.init_weights(seed=6)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), other.parameters()):
        assert torch.equal(x, y), name
        if name.endswith("norm.weight"):
            assert (x == 1).all(), name
        elif name.endswith(("bias", "sinks")):
            assert (x == 0).all(), name
        else:
            residual = name.endswith(("attention.out.weight", "down_weight"))
            assert x.detach().std() == pytest.approx(0.02 / (6**0.5 if residual else 1), rel=0.1), (
                name
            )
            assert x.mean().abs() < 0.002 and not torch.equal(x, z), name
    assert a(torch.zeros(1, 5, dtype=torch.int64)).isfinite().all()


def test_a_new_model_is_initialised():
    """On a real device GPTOSS(config) sets every parameter, as init_weights does on its own."""
    model, twin = GPTOSS(tiny_config()), materialised(tiny_config())
    twin.init_weights()
    for (name, x), y in zip(model.named_parameters(), twin.parameters()):
        assert torch.equal(x, y), name


def test_parameter_names():
    """They are a contract: the names of the checkpoint files."""
    with torch.device("meta"):
        model = GPTOSS(tiny_config(num_hidden_layers=1))
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        "embedding.weight": (61, 20),
        "blocks.0.attention_norm.weight": (20,),
        "blocks.0.attention.sinks": (6,),
        "blocks.0.attention.qkv.weight": (96, 20),
        "blocks.0.attention.qkv.bias": (96,),
        "blocks.0.attention.out.weight": (20, 48),
        "blocks.0.attention.out.bias": (20,),
        "blocks.0.mlp_norm.weight": (20,),
        "blocks.0.mlp.router.weight": (5, 20),
        "blocks.0.mlp.router.bias": (5,),
        "blocks.0.mlp.gate_up_weight": (5, 20, 24),
        "blocks.0.mlp.gate_up_bias": (5, 24),
        "blocks.0.mlp.down_weight": (5, 12, 20),
        "blocks.0.mlp.down_bias": (5, 20),
        "norm.weight": (20,),
        "unembedding.weight": (61, 20),
    }
