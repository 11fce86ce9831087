"""What only a GPU has: fused attention kernels, the compiled model, memory, NCCL. The pairs of
model.py and fast.py on a GPU are in test_fast.py.

A kernel in bf16 is right if it is as near to the definition in fp64 as the definition itself is in
bf16.
"""

import functools
import os
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch
import torch.distributed as dist
from torch._inductor import metrics
from torch.distributed.device_mesh import init_device_mesh

import fast
import flash
import model as model_module
import sp
from common import (
    assert_all_close,
    batch,
    gradients,
    noise_,
    packed,
    relative,
    run_ranks,
    tiny_config,
)
from flash import CudnnSinkAttention, block_mask, cudnn_refuses
from generate import Decoder, capturable, generate
from loop import memory
from loop.budget import activations
from loop.memory import HostMemory, SplitAdamW, join
from loop.options import Options
from model import GPTOSS, GPTOSSConfig, dense_attention, flex_sink_attention
from train import build_model

pytestmark = pytest.mark.gpu
CUDA, GIB = torch.device("cuda"), 2**30


@pytest.fixture(autouse=True)
def compile_afresh():
    """Each test compiles for its own shapes. Past the recompile limit everything would silently run
    unfused."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


# --------------------------------------------------------------------------------------------------
# Attention


def attention_inputs(S, dtype, B=2, H=32, K=4, D=64):
    """q, k, v, sinks and a gradient of the output."""
    generator = torch.Generator(CUDA).manual_seed(S)
    shapes = (B, S, H, D), (B, S, K, D), (B, S, K, D), (H,), (B, S, H, D)
    *inputs, grad = (
        torch.randn(shape, generator=generator, device=CUDA).to(dtype) for shape in shapes
    )
    return inputs, grad


def outcome(attention, inputs, grad, dtype):
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = attention(*leaves)
    return dict(
        zip(
            ["out", "dq", "dk", "dv", "dsinks"],
            (out, *torch.autograd.grad(out, leaves, grad.to(dtype))),
        )
    )


def assert_as_near_as_dense(attention, inputs, grad, window=None, documents=None):
    """Errors against the definition in fp64 are at most those of the definition in bf16; a tenth
    more makes a tie a tie."""
    dense = functools.partial(dense_attention, window=window, documents=documents)
    exact = outcome(dense, inputs, grad, torch.float64)
    plain = outcome(dense, inputs, grad, torch.bfloat16)
    actual = outcome(attention, inputs, grad, torch.bfloat16)
    errors = {
        name: (relative(actual[name], exact[name]), relative(plain[name], exact[name]))
        for name in exact
    }
    print({name: f"{ours:.1e} of {theirs:.1e}" for name, (ours, theirs) in errors.items()})
    assert all(ours <= 1.1 * theirs for ours, theirs in errors.values()), errors


def two_rows_of_documents(S):
    """Numbered in no order; ends that are no block's ends; a document of one token."""
    a, b = S // 3 + 5, S // 2 - 1
    return torch.stack([packed([a, 1, S - a - 1], [7, 0, 3]), packed([b, S - b], [1, 2])]).to(CUDA)


@pytest.mark.parametrize(
    "S, window, documents",
    [
        (1000, None, False),
        (1000, 128, False),
        (1000, None, True),
        (300, 128, True),
        (512, 129, True),
        (70, 16, True),
    ]
    + [(1300, 128, False)],  # what padding broke: see fused
)
def test_flex_attention(S, window, documents):
    documents = two_rows_of_documents(S) if documents else None
    attention = functools.partial(flex_sink_attention, mask=block_mask(S, window, documents, CUDA))
    assert_as_near_as_dense(attention, *attention_inputs(S, torch.bfloat16), window, documents)


@pytest.mark.parametrize(
    "S, H, K, window, documents",
    [(300, 32, 4, None, False), (300, 32, 4, 128, True)]
    + [
        (1300, 32, 4, 128, False),
        (1300, 32, 4, None, True),
        (300, 4, 1, None, False),
    ],  # what padding broke: see fused
)
def test_flex_attention_in_fp32(S, H, K, window, documents):
    documents = two_rows_of_documents(S) if documents else None
    inputs, grad = attention_inputs(S, torch.float32, H=H, K=K)
    attention = functools.partial(flex_sink_attention, mask=block_mask(S, window, documents, CUDA))
    dense = functools.partial(dense_attention, window=window, documents=documents)
    actual = outcome(attention, inputs, grad, torch.float32)
    assert_all_close(actual, outcome(dense, inputs, grad, torch.float64), 1e-5)


def skip_without_cudnn():
    refusal = cudnn_refuses(CUDA, torch.bfloat16, 64)
    assert refusal is None or torch.cuda.get_device_capability() < (9, 0), (
        refusal
    )  # a Hopper GPU has no excuse
    if refusal:
        pytest.skip(f"cuDNN's attention: {refusal}")


@pytest.mark.parametrize("most", [2**33, 1], ids=["all heads", "groups of heads"])
@pytest.mark.parametrize("S", [300, 1000, 1024])
def test_cudnn_attention(S, most, monkeypatch):
    skip_without_cudnn()
    monkeypatch.setattr(fast, "ATTENTION_BYTES", most)
    assert_as_near_as_dense(CudnnSinkAttention.apply, *attention_inputs(S, torch.bfloat16))


@pytest.mark.parametrize("most", [2**33, 1], ids=["all heads", "groups of heads"])
@pytest.mark.parametrize("long", [200, 500, 10_000])
def test_document_attention(long, most, monkeypatch):
    """Documents of 1, 338, 499, 501 and 661 tokens: most, some or none of them on cuDNN."""
    skip_without_cudnn()
    monkeypatch.setattr(fast, "ATTENTION_BYTES", most)
    assert flash.documents_refused(CUDA, torch.bfloat16, 64) is None
    monkeypatch.setattr(flash, "LONG", long)
    documents = two_rows_of_documents(1000)
    plan = flash.plan_documents(documents)
    attention = functools.partial(flash.document_attention, plan=plan)
    assert_as_near_as_dense(attention, *attention_inputs(1000, torch.bfloat16), documents=documents)


@pytest.mark.parametrize("most", [2**33, 1], ids=["all heads", "groups of heads"])
@pytest.mark.parametrize(
    "lengths", [[32768], [512] * 64, [32] * 1024, [3000] * 9 + [5768], [32232, 536]], ids=str
)
def test_document_attention_works_in_what_is_planned(lengths, most, monkeypatch):
    """Of 2 key-value heads: one group, or two. Its results are not counted, but of two groups the
    results of one are."""
    skip_without_cudnn()
    monkeypatch.setattr(fast, "ATTENTION_BYTES", most)
    inputs, grad = attention_inputs(32768, torch.bfloat16, B=1, H=16, K=2)
    q, k, v, sinks = (x.requires_grad_() for x in inputs)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(CUDA)
    plan = flash.plan_documents(documents)
    out = flash.document_attention(q, k, v, sinks, plan=plan)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    grads = torch.autograd.grad(out, (q, k, v, sinks), grad)
    working = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in grads)
    planned = 1.05 * flash.backward_bytes(plan, q.flatten(0, 1))
    assert working <= (planned if most > 1 else (planned + q.nbytes + k.nbytes + v.nbytes) / 2)


@pytest.mark.parametrize("kind", ["flex", "flex, documents", "cudnn", "by document"])
def test_attention_memory_grows_with_the_length(kind):
    """Forward and backward peak at no more than a quarter of what one head's scores would take."""
    if kind in ("cudnn", "by document"):
        skip_without_cudnn()
    S = 32 * 1024
    inputs, grad = attention_inputs(S, torch.bfloat16, B=1, H=8, K=1)
    documents = two_rows_of_documents(S)[:1] if kind == "flex, documents" else None
    attention = functools.partial(
        flex_sink_attention,
        mask=block_mask(S, None if documents is not None else 128, documents, CUDA),
    )
    if kind == "cudnn":
        attention = CudnnSinkAttention.apply
    elif kind == "by document":
        plan = flash.plan_documents(two_rows_of_documents(S)[:1])
        attention = functools.partial(flash.document_attention, plan=plan)
    outcome(attention, inputs, grad, torch.bfloat16)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outcome(attention, inputs, grad, torch.bfloat16)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= 2 * S * S / 4, f"{peak / GIB:.2f} GiB"


def test_choice_of_attention(capsys):
    skip_without_cudnn()
    fast.say.cache_clear()
    choose = functools.partial(model_module.choose_attention, 256, device=CUDA, head_dim=64)
    documents = two_rows_of_documents(256)
    assert choose(None, None, dtype=torch.bfloat16) == CudnnSinkAttention.apply
    for window, packing, dtype in (
        (128, None, torch.bfloat16),
        (128, documents, torch.bfloat16),
        (None, documents, torch.float32),
        (None, None, torch.float32),
    ):
        assert choose(window, packing, dtype=dtype).func is flex_sink_attention
    assert choose(None, documents, dtype=torch.bfloat16).func is flash.document_attention
    again = documents.clone()
    again[:, -1] = again[:, 0]
    assert choose(None, again, dtype=torch.bfloat16).func is flex_sink_attention
    said = capsys.readouterr().out
    assert (
        "full layers: cuDNN" in said
        and "window 128 layers: FlexAttention" in said
        and "has no torch.float32" in said
    )


# --------------------------------------------------------------------------------------------------
# The model


def small_config(**changes):
    """Sizes that the fused kernels and grouped matmuls are made for."""
    sizes = {
        "num_hidden_layers": 4,
        "num_experts": 8,
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 192,
    }
    sizes |= {
        "head_dim": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
    }
    return tiny_config(**{**sizes, "max_position_embeddings": 4096, **changes})


def run_model(
    config,
    tokens,
    targets,
    documents=None,
    device=CUDA,
    dtype=torch.float32,
    recompute="none",
    offload=False,
):
    """{loss and the gradient of every parameter}, on the CPU; the weights are exact in bf16."""
    model = noise_(GPTOSS(config)).bfloat16().to(device, dtype)
    model.recompute = recompute
    documents = None if documents is None else documents.to(device)
    with HostMemory() if offload else nullcontext():
        loss = model(tokens.to(device), targets.to(device), documents)
    loss.backward()
    return {
        "loss": loss.detach().cpu(),
        **{name: gradient.cpu() for name, gradient in gradients(model).items()},
    }


@pytest.mark.parametrize("documents", [False, True])
def test_model_in_fp32(documents):
    tokens, targets = batch(small_config(), 2, 300)
    documents = two_rows_of_documents(300) if documents else None
    actual = run_model(small_config(), tokens, targets, documents)
    expected = run_model(small_config(), tokens, targets, documents, torch.device("cpu"))
    assert relative(actual["loss"], expected["loss"]) <= 1e-5
    assert_all_close(actual, expected, 1e-4)


def error_of_all(actual, expected):
    flat = [
        torch.cat([tensors[name].double().flatten() for name in expected if name != "loss"])
        for tensors in (actual, expected)
    ]
    return relative(*flat)


def test_model_in_bf16():
    """The error against fp32, beside the definition's own in bf16 on a CPU; half as much again,
    because each sends other tokens to wrong experts."""
    tokens, targets = batch(small_config(), 2, 300)
    exact = run_model(small_config(), tokens, targets, device=torch.device("cpu"))
    plain = run_model(
        small_config(), tokens, targets, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    actual = run_model(small_config(), tokens, targets, dtype=torch.bfloat16)
    assert relative(actual["loss"], exact["loss"]) <= 1e-2
    assert error_of_all(actual, exact) <= 1.5 * error_of_all(plain, exact)


@pytest.mark.parametrize("recompute, runs", [("attention", 1), ("all", 2)])
def test_recompute(recompute, runs, monkeypatch):
    """The same gradients as without; cuDNN's forward runs once per full layer if it is kept."""
    skip_without_cudnn()
    tokens, targets = batch(small_config(), 2, 384)
    expected = run_model(small_config(), tokens, targets, dtype=torch.bfloat16)
    calls, op = [], torch.ops.aten._scaled_dot_product_cudnn_attention

    def counted(*args, **kwargs):
        calls.append(args)
        return op(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", counted)
    actual = run_model(small_config(), tokens, targets, dtype=torch.bfloat16, recompute=recompute)
    assert len(calls) == 2 * runs
    assert error_of_all(actual, expected) <= 5e-3  # cuDNN's backward adds in any order
    assert relative(actual["loss"], expected["loss"]) <= 1e-5


@pytest.mark.parametrize("recompute", ["none", "attention"])
def test_new_documents_compile_nothing(recompute):
    config = small_config()
    model = noise_(GPTOSS(config, recompute)).to(CUDA, torch.bfloat16)

    def step(seed):
        tokens, targets = (x.to(CUDA) for x in batch(config, 2, 384, seed))
        documents = (
            torch.randint(3, (2, 384), generator=torch.Generator().manual_seed(seed))
            .sort()
            .values.to(CUDA)
        )
        model(tokens, targets, documents).backward()

    step(0)
    stats = torch._dynamo.utils.counters[
        "stats"
    ]  # of all threads: a checkpointed block runs again in the backward's
    compiled = stats["unique_graphs"]
    step(1)
    step(2)
    assert compiled > 0 and stats["unique_graphs"] == compiled


@pytest.mark.parametrize("what", ["loss", "logprobs", "entropy"])
def test_loss_memory(what):
    """64K tokens, the real vocabulary: forward and backward take at most 3 GiB beyond the fp32 sum
    of the weight's gradient (2.2 GiB). The logits would be 24.6 GiB."""
    N, V, C = 64 * 1024, 201088, 2880
    x = torch.randn(N, C, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, C, device=CUDA, dtype=torch.bfloat16) / C**0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=CUDA)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    if what == "loss":
        fast.mean_loss(x, weight, targets, None, torch.tensor(float(N), device=CUDA)).backward()
    elif what == "logprobs":
        fast.logprobs(x, weight, targets, 1.0).sum().backward()
    else:
        sum(fast.logprobs_and_entropy(x, weight, targets, 1.0)).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before - 4 * V * C
    assert peak <= 3 * GIB, f"{peak / GIB:.2f} GiB"
    assert x.grad.isfinite().all() and weight.grad.isfinite().all()


def test_kept_blocks_keep_what_is_estimated():
    """At the 20b's layer shapes: what two blocks keep beyond their inputs, against the dry run."""
    config = GPTOSSConfig(num_hidden_layers=2, vocab_size=1024)
    run = {"sp": 1, "seq_len": 8192, "micro_batch": 1, "recompute": "all", "offload": False}
    model = noise_(GPTOSS(config, "all").to(CUDA, torch.bfloat16))
    tokens, targets = (x.to(CUDA) for x in batch(config, 1, run["seq_len"]))
    kept, estimated = {}, {}
    for blocks in (0, 2):
        model.keep_blocks = blocks
        for _ in range(2):  # the first run compiles
            before = torch.cuda.memory_allocated()
            loss = model(tokens, targets)
            kept[blocks] = torch.cuda.memory_allocated() - before
            del loss
        in_loss = activations(config, lambda *tile: 0, keep_blocks=blocks, **run)[-1]
        estimated[blocks], _ = in_loss
    assert kept[2] - kept[0] == pytest.approx(estimated[2] - estimated[0], rel=0.03)


def test_swiglu_backward_is_one_kernel():
    """What its docstring says of the compiler."""
    h, bias, da = (
        torch.randn(shape, device=CUDA).bfloat16() for shape in [(256, 128), (4, 128), (256, 64)]
    )
    expert, weight = torch.randint(4, (256,), device=CUDA), torch.rand(256, device=CUDA)
    dh = torch.empty_like(h)
    metrics.reset()
    fast.biased_swiglu_backward_(h, bias, expert, 7.0, da, weight, *dh.chunk(2, dim=-1))
    assert metrics.generated_kernel_count == 1


@pytest.mark.parametrize("recompute", ["all", "attention"])
def test_host_memory(recompute, monkeypatch):
    """Block inputs offloaded to host memory give the same gradients and free GPU memory."""
    monkeypatch.setattr(
        memory, "PIECE", 1_000_000
    )  # of 2,097,152 numbers: the last piece is a rest
    config = small_config(num_hidden_layers=8)
    model = noise_(GPTOSS(config, recompute)).to(CUDA, torch.bfloat16)
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # FlexAttention everywhere: two runs can be compared bit by bit
    try:
        tokens, targets = (x.to(CUDA) for x in batch(config, 2, 4096))
        kept, outcomes = [], []
        for place in (nullcontext, HostMemory):
            for _ in range(2):  # the first compiles
                model.zero_grad()
                before = torch.cuda.memory_allocated()
                with place():
                    loss = model(tokens, targets)
                torch.cuda.synchronize()
                kept.append(torch.cuda.memory_allocated() - before)
                loss.backward()
            outcomes.append({"loss": loss.detach(), **gradients(model)})
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(outcomes[0][name], outcomes[1][name]) for name in outcomes[0])
    one_input = tokens.numel() * config.hidden_size * 2
    assert kept[1] - kept[3] >= 7 * one_input, (kept, one_input)


@pytest.mark.parametrize("size", [1000, 4096, 16])
def test_split_optimizer(size):
    """The compiled update gives the CPU's numbers."""
    generator = torch.Generator().manual_seed(0)
    start, *grads = (torch.randn(size, generator=generator).bfloat16() for _ in range(6))
    ends = []
    for device in ("cpu", "cuda"):
        parameter = start.to(device, copy=True).requires_grad_()
        optimizer = SplitAdamW([parameter], lr=1e-3, weight_decay=0.1)
        for grad in grads:
            parameter.grad = grad.to(device)
            optimizer.step()
        ends.append(join(parameter.detach(), optimizer.state[parameter]["rest"]).cpu())
    assert relative(*ends) <= 1e-6
    assert relative(ends[0], start) >= 1e-4


@pytest.mark.parametrize("few", [0, 8])
def test_generation(few, monkeypatch):
    """Greedy tokens on the GPU are the CPU's, and those without a cache; for few tokens by either
    way of computing experts, of which one can be captured in fp32."""
    monkeypatch.setattr(fast, "FEW_TOKENS", few)
    config = small_config(sliding_window=16)
    prompts = [batch(config, 1, n)[0][0].tolist() for n in (50, 1, 300, 128, 129)]
    model = noise_(GPTOSS(config))
    expected = generate(model, prompts, 40, temperature=0.0)
    model.to(CUDA)
    assert capturable(model, 5) == (few == 8)
    for options in {"together": 2}, {"together": 5}, {"graphs": False}, {"top_p": 0.5}:
        answers = generate(model, prompts, 40, temperature=0.0, **options)
        for (tokens, logprobs), right in zip(answers, expected):
            assert tokens == right.tokens
            torch.testing.assert_close(logprobs, right.logprobs, rtol=0, atol=1e-4)
    with torch.no_grad():
        tokens = torch.tensor([prompts[0] + expected[0].tokens], device=CUDA)
        assert model(tokens)[0, 49:-1].argmax(-1).tolist() == expected[0].tokens


@pytest.mark.parametrize("top_p", [1.0, 0.9])
@pytest.mark.parametrize("slots", [1, 3])
def test_captured_steps_equal_launched_ones(slots, top_p):
    model = noise_(GPTOSS(small_config(sliding_window=16))).to(CUDA, torch.bfloat16)
    prompts = [batch(model.config, 1, n)[0][0].tolist() for n in (250, 3, 90)]
    options = {"top_p": top_p, "seeds": [3, 4, 3], "together": slots}
    assert capturable(model, slots)
    captured, launched = (generate(model, prompts, 300, graphs=g, **options) for g in (True, False))
    for one, other in zip(captured, launched):
        assert one.tokens == other.tokens
        torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-3)
    decoder = Decoder(model, 1, 700)
    assert len(list(decoder.stream([prompts[0]], 300))) == 300
    assert list(decoder.graphs) == [256, 512, 700]  # read more of the cache as it fills


@pytest.mark.parametrize("slots", [1, 3])
def test_captured_steps_read_weights_that_changed_in_place(slots):
    """A kept decoder replays what it captured before an update, and draws as a new one does. Where
    weights have moved it captures anew, or it would read what lies at their old place."""
    model = noise_(GPTOSS(small_config(sliding_window=16))).to(CUDA, torch.bfloat16)
    prompts = [batch(model.config, 1, n)[0][0].tolist() for n in (250, 3, 90)]
    kept, optimizer = Decoder(model, slots, 400), torch.optim.SGD(model.parameters(), 0.3)
    tokens, targets = (x.to(CUDA) for x in batch(model.config, 1, 128))
    drawn, captured = [], []
    for moves in (False, False, True):
        if moves:
            olds = [parameter.data for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            for old in olds:
                old.fill_(torch.nan)
        found = kept.answers(prompts, 60)
        expected = Decoder(model, slots, 400).answers(prompts, 60)
        for one, other in zip(found, expected):
            assert one.tokens == other.tokens
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-3)
        drawn.append([answer.tokens for answer in found])
        captured.append(dict(kept.graphs))
        model(tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert drawn[0] != drawn[1] != drawn[2]
    assert captured[0] and captured[0] == captured[1]
    assert captured[2].keys() == captured[1].keys()
    assert not set(captured[1].values()) & set(captured[2].values())


# --------------------------------------------------------------------------------------------------
# In processes of their own


def twice_deterministic():
    """For each gradient and the loss, whether two runs give the same bits."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = (
        ":4096:8"  # read when CUDA starts, which in this process it has not
    )
    assert not torch.cuda.is_initialized()
    torch.use_deterministic_algorithms(True)
    equal = {}
    for documents in (None, two_rows_of_documents(300)):
        for dtype, recompute in (torch.bfloat16, "attention"), (torch.float32, "none"):
            tokens, targets = batch(small_config(), 2, 300)
            a, b = (
                run_model(small_config(), tokens, targets, documents, CUDA, dtype, recompute)
                for _ in range(2)
            )
            equal |= {
                f"{name} {dtype} {documents is None}": torch.equal(a[name], b[name])
                and bool(a[name].isfinite().all())
                for name in a
            }
    return equal


def test_deterministic_algorithms():
    (equal,) = run_ranks(1, twice_deterministic)
    assert len(equal) > 100
    assert all(equal.values()), [name for name, same in equal.items() if not same]


def stream_of(x):
    """The stream in whose memory x lies."""
    (stream,) = (
        s["stream"]
        for s in torch.cuda.memory_snapshot()
        if s["address"] <= x.data_ptr() < s["address"] + s["total_size"]
    )
    return stream


def gradients_of_training():
    """{(optimizer, name): the stream in whose memory the gradient lies}"""
    found = {}
    for optimizer in ("split", "fp32"):
        options = Options(**asdict(small_config()), optimizer=optimizer, batch_size=1)
        mesh = init_device_mesh("cuda", (1, 1), mesh_dim_names=("replica", "shard"))
        model = build_model(options, small_config(), CUDA, mesh, torch.bfloat16)
        tokens, targets = batch(small_config(), 1, 256)
        model(tokens.to(CUDA), targets.to(CUDA)).backward()
        for name, gradient in gradients(model).items():
            found[optimizer, name] = stream_of(gradient.to_local())
    return found


def test_gradients_lie_in_the_computations_memory():
    """FSDP would put them in the memory of its own stream, which a forward cannot reuse."""
    (found,) = run_ranks(1, gradients_of_training, backend="nccl")
    assert len(found) > 50
    assert set(found.values()) == {torch.cuda.current_stream().cuda_stream}


def exchanged_gradients():
    """One exchange in bf16, called as FSDP calls it: whether the sums are right, and the streams
    in whose memory the sums and what was received lie, then the computing stream."""
    module, ours = torch.nn.Linear(1024, 1024), torch.cuda.current_stream()
    reduce = memory.ReduceScatter(module, CUDA, torch.float32)
    sent = reduce.allocate((2**20,), dtype=torch.bfloat16, device=CUDA).normal_()
    fsdp = torch.cuda.Stream()
    fsdp.wait_stream(ours)
    with torch.cuda.stream(fsdp):
        sums = reduce.allocate((2**20,), dtype=torch.bfloat16, device=CUDA)
        reduce(sums, sent, dist.group.WORLD, dist.ReduceOp.SUM)
    ours.wait_stream(fsdp)
    return torch.equal(sums, sent), stream_of(sums), stream_of(sent.received), ours.cuda_stream


def test_what_is_received_lies_in_the_computations_memory():
    ((right, sums, received, ours),) = run_ranks(1, exchanged_gradients, backend="nccl")
    assert right
    assert (sums, received) == (ours, ours)


NCCL_CASES = [
    (documents, kv_heads, "none", False) for documents in (False, True) for kv_heads in (1, 2)
]
NCCL_CASES += [(False, 2, "attention", False), (False, 2, "all", True)]


def nccl_case(documents, kv_heads, recompute, offload, cut):
    config = small_config(num_hidden_layers=2, num_key_value_heads=kv_heads)
    tokens, targets = batch(config, 2, 300)
    targets[:, 10:120] = model_module.IGNORED  # so that the ranks' counts differ
    documents = two_rows_of_documents(300) if documents else None
    return run_model(
        config,
        *cut(tokens.to(CUDA), targets.to(CUDA), documents),
        recompute=recompute,
        offload=offload,
    )


def on_two_gpus():
    sp.init(init_device_mesh("cuda", (dist.get_world_size(),)))
    return [nccl_case(*case, sp.shard) for case in NCCL_CASES]


def test_two_ranks_over_nccl_equal_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = run_ranks(2, on_two_gpus, backend="nccl", timeout=400)
    for case, *parts in zip(NCCL_CASES, *ranks):
        torch._dynamo.reset()
        expected = nccl_case(*case, lambda *batch: batch)
        actual = {name: sum(part[name] for part in parts) for name in expected}
        assert relative(actual["loss"], expected["loss"]) <= 1e-6
        assert_all_close(actual, expected, 1e-5)
