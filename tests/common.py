"""What the tests share: small models with noise in every parameter, the same in transformers, and
ranks to run them on.

Noise everywhere, because a zero hides bugs: a sink or a bias that is left out changes nothing while
it is zero."""

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, start_processes

from model import GPTOSS, IGNORED, GPTOSSConfig
from weights import copy_rows

# --------------------------------------------------------------------------------------------------
# Models and batches


def tiny_config(**changes):
    """A small model in which no two sizes are equal. Its initial context is short, so that YaRN's
    ramp matters from the first positions on."""
    sizes = {
        "num_hidden_layers": 3,
        "num_experts": 5,
        "experts_per_token": 2,
        "vocab_size": 61,
        "hidden_size": 20,
        "intermediate_size": 12,
        "head_dim": 8,
        "num_attention_heads": 6,  # times head_dim is not hidden_size, as in the real model
        "num_key_value_heads": 3,
        "sliding_window": 7,
        "swiglu_limit": 1.5,  # low enough to clamp a good part of the gates
        "initial_context_length": 16,
        "rope_theta": 1000.0,
        "rope_scaling_factor": 4.0,
        "max_position_embeddings": 256,
    }
    return GPTOSSConfig(**{**sizes, **changes})


def random_bf16(x, generator):
    """fp32 -> the bf16 value above or below, at random, the nearer one more often."""
    random = torch.randint(
        1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device
    )
    return ((x.view(torch.int32) + random) & -(1 << 16)).view(torch.float32)


@torch.no_grad()
def noise_(module, seed=0, rounding=None):
    """Fill every parameter of a model, ours or transformers', sharded or not, with noise that keeps
    activations near 1 and makes biases matter. It is generated on the parameter's device, and
    differs between devices. rounding: a seed with which random_bf16 rounds it."""
    for number, (name, parameter) in enumerate(module.named_parameters()):
        generator = torch.Generator(parameter.device).manual_seed(1000 * seed + number)
        noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
        if name.endswith("norm.weight"):
            noise = 1 + noise / 4
        elif name.endswith("bias"):
            noise = noise / 3
        elif not name.endswith("sinks"):
            noise = noise / parameter.shape[1] ** 0.5  # (out, in) or (experts, in, out)
        if rounding is not None:
            noise = random_bf16(noise, generator.manual_seed(1000 * rounding + number))
        copy_rows(parameter, noise)
    return module


def batch(config, B, S, seed=0):
    """tokens and targets (B, S); about a quarter of the targets do not count."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(config.vocab_size, (2, B, S), generator=generator)
    return tokens, targets.masked_fill(torch.rand(B, S, generator=generator) < 0.25, IGNORED)


def packed(lengths, numbers):
    """The documents of one row: `numbers` repeated `lengths` times."""
    return torch.tensor(numbers).repeat_interleave(torch.tensor(lengths))


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --------------------------------------------------------------------------------------------------
# Comparison


def relative(actual, expected):
    """Norm of the difference over the norm of what is expected, in fp64."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} and {tuple(expected.shape)}"
    actual, expected = actual.detach().to(expected.device).double(), expected.detach().double()
    difference, norm = (actual - expected).norm().item(), expected.norm().item()
    return difference / norm if norm else float(difference != 0)


def assert_all_close(actual, expected, tolerance):
    """Two dictionaries of tensors: equal keys, each relative error at most `tolerance`."""
    assert actual.keys() == expected.keys()
    errors = {name: relative(actual[name], expected[name]) for name in expected}
    wrong = {
        name: error for name, error in errors.items() if not error <= tolerance
    }  # so that NaN is wrong
    assert not wrong, f"relative errors over {tolerance}: {wrong}"


# --------------------------------------------------------------------------------------------------
# Experts, one token after the other


def naive_experts(x, experts, weights, w1, b1, w2, b2, limit):
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for choice in range(experts.shape[1]):
            e = experts[token, choice]
            gate, up = (x[token] @ w1[e] + b1[e]).chunk(2)
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            hidden = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            out[token] += weights[token, choice] * (hidden @ w2[e] + b2[e])
    return out


def expert_inputs(N, k, used, dtype):
    """Seven experts, of which only those in `used` are chosen."""
    generator = torch.Generator().manual_seed(N)
    experts = torch.stack(
        [torch.tensor(used)[torch.randperm(len(used), generator=generator)[:k]] for _ in range(N)]
    )
    shapes = (
        (N, 24),
        (N, k),
        (7, 24, 32),
        (7, 32),
        (7, 16, 24),
        (7, 24),
        (N, 24),
    )  # bf16 wants sizes that 8 divides
    x, weights, w1, b1, w2, b2, grad = (torch.randn(shape, generator=generator) for shape in shapes)
    tensors = [t.to(dtype) for t in (x, w1 / 5, b1, w2 / 4, b2, grad)]
    return experts, weights.softmax(-1), *tensors


# --------------------------------------------------------------------------------------------------
# Attention


def attention_inputs(B=2, S=23, H=6, K=3, D=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v, grad = (
        torch.randn(B, S, heads, D, generator=generator, dtype=dtype) for heads in (H, K, K, H)
    )
    sinks = 2 * torch.randn(H, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, sinks)], grad


def attention_without_sinks(q, k, v):
    """Causal attention and the logsumexp of its scores, (B, H, S, D) and (B, H, S)."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (
        x.transpose(1, 2)
        for x in (q, k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2))
    )
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


# --------------------------------------------------------------------------------------------------
# The same model in transformers


def hugging_face_config(config, **changes):
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    rope = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.rope_scaling_factor,
        "beta_slow": config.rope_ntk_alpha,
        "beta_fast": config.rope_ntk_beta,
        "original_max_position_embeddings": config.initial_context_length,
        "truncate": changes.pop("truncate", False),
    }
    same = "num_hidden_layers vocab_size hidden_size intermediate_size head_dim sliding_window"
    same += " num_attention_heads num_key_value_heads swiglu_limit max_position_embeddings"
    same += " rms_norm_eps"
    return transformers.GptOssConfig(
        **{name: getattr(config, name) for name in same.split()},
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.experts_per_token,
        rope_parameters=rope,
        **changes,
    )


def from_hugging_face(theirs):
    """{transformers' name: tensor} -> {our name: tensor}, of parameters or of their gradients."""
    ours = {
        "embedding.weight": theirs["model.embed_tokens.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "unembedding.weight": theirs["lm_head.weight"],
    }
    layer = 0
    while f"model.layers.{layer}.self_attn.sinks" in theirs:
        block, old = f"blocks.{layer}.", f"model.layers.{layer}."
        ours[block + "attention_norm.weight"] = theirs[old + "input_layernorm.weight"]
        ours[block + "mlp_norm.weight"] = theirs[old + "post_attention_layernorm.weight"]
        ours[block + "attention.sinks"] = theirs[old + "self_attn.sinks"]
        for kind in ("weight", "bias"):
            ours[block + f"attention.qkv.{kind}"] = torch.cat(
                [theirs[old + f"self_attn.{x}_proj.{kind}"] for x in "qkv"]
            )
            ours[block + f"attention.out.{kind}"] = theirs[old + f"self_attn.o_proj.{kind}"]
            ours[block + f"mlp.router.{kind}"] = theirs[old + f"mlp.router.{kind}"]
        for kind, suffix in ("weight", ""), ("bias", "_bias"):
            gate_up = theirs[
                old + f"mlp.experts.gate_up_proj{suffix}"
            ]  # there gates and ups take turns
            ours[block + f"mlp.gate_up_{kind}"] = torch.cat(
                (gate_up[..., ::2], gate_up[..., 1::2]), dim=-1
            )
            ours[block + f"mlp.down_{kind}"] = theirs[old + f"mlp.experts.down_proj{suffix}"]
        layer += 1
    return ours


def twins(config, seed=0, recompute="none"):
    """The same noise as a GPTOSS and as transformers' GptOssForCausalLM with eager attention and
    experts."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = hugging_face_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    theirs = noise_(transformers.GptOssForCausalLM(theirs), seed)
    for layer in theirs.model.layers:
        layer.mlp.experts.limit = config.swiglu_limit  # which 5.17 fixes at 7
    ours = GPTOSS(config, recompute)
    ours.load_state_dict(from_hugging_face(dict(theirs.named_parameters())))
    return ours, theirs


def hugging_face_gradients(theirs):
    return from_hugging_face(
        {name: parameter.grad for name, parameter in theirs.named_parameters()}
    )


# --------------------------------------------------------------------------------------------------
# Ranks

# What the server of forked processes imports, so that each of them starts in no time. The first use
# of the server decides. What is not installed is done without.
PRELOADED = ["train", "pytest", "matplotlib.figure", "matplotlib.backends.backend_agg"]


def run_ranks(n, function, *arguments, backend="gloo", timeout=200, start_method="forkserver"):
    """[what function(*arguments) returned on rank 0, on rank 1, …], each rank a process of its own
    on this machine.

    RuntimeError with the traceback of the first rank that failed, TimeoutError after `timeout`
    seconds; no rank survives either. The processes are forked from a server that has imported what
    takes long, so that only the first start is slow."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _one_rank,
            (n, folder, backend, function, arguments),
            n,
            join=False,
            start_method=start_method,
        )
        deadline = time.monotonic() + timeout
        try:
            while not ranks.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"{n} ranks of {function.__name__} ran for more than {timeout} seconds"
                    )
        except (
            ProcessException
        ) as error:  # of whichever rank was looked at first: others fail when the first one is gone
            failures = sorted(
                Path(folder).glob("failure*"), key=lambda path: path.stat().st_mtime_ns
            )
            raise RuntimeError(failures[0].read_text() if failures else str(error)) from None
        finally:
            for process in ranks.processes:
                process.kill()
        return [
            torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(n)
        ]


def _one_rank(rank, n, folder, backend, function, arguments):
    os.environ["RANK"] = str(rank)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=n)
    try:
        torch.save(function(*arguments), Path(folder) / f"result{rank}.pt")
    except BaseException:
        (Path(folder) / f"failure{rank}").write_text(traceback.format_exc())
        raise
    dist.barrier()  # nobody leaves while another rank still talks to it
    dist.destroy_process_group()
