"""`python -m bench --inspect` against transformers' routers, attention weights and logits."""

import json

import pytest
import torch
from torch.special import entr

import sample
from bench import __main__ as bench
from bench import inspection
from bench.inspection import expert_load, inspect, sink_shares
from common import batch, noise_, packed, tiny_config, twins
from corpora import need_vocabulary
from model import GPTOSS, GPTOSSConfig, dense_attention
from test_sample import SIZES, save_state


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted folder, a finished run of bytes, and one that has a state only."""
    root = tmp_path_factory.mktemp("inspect")
    model = noise_(GPTOSS(tiny_config(**SIZES)))
    model.save_checkpoint(root / "converted")
    model.save_checkpoint(root / "runs/whole/model")
    save_state(model, root / "runs/young", 10)
    for name in "whole", "young":
        text = json.dumps({"name": name, "tokenizer": "bytes"})
        (root / f"runs/{name}/config.json").write_text(text)
    return root


@torch.no_grad()
def test_against_transformers():
    """Routes, their weights, sinks' shares and entropies of attention, from what transformers
    itself returns, which drops the sinks' column after the softmax."""
    ours, theirs = twins(tiny_config())
    tokens, _ = batch(ours.config, 2, 23)
    routed = []
    for layer in theirs.model.layers:
        layer.mlp.router.register_forward_hook(lambda _, __, output: routed.append(output))
    out = theirs(tokens, output_attentions=True)
    found = inspect(ours, tokens)
    assert len(routed) == len(out.attentions) == 3 and found.sinks.shape == (3, 2, 6, 23)
    for layer, (probs, (_, weights, chosen)) in enumerate(zip(out.attentions, routed)):
        assert torch.equal(found.routes[layer].flatten(0, 1), chosen)
        torch.testing.assert_close(
            found.weights[layer].flatten(0, 1), weights.gather(1, chosen)
            if weights.shape != chosen.shape else weights, atol=1e-5, rtol=0
        )  # fmt: skip
        share = 1 - probs.sum(-1)  # (B, H, S)
        assert 0.05 < share.mean() < 0.95
        torch.testing.assert_close(found.sinks[layer], share, atol=1e-5, rtol=0)
        entropy = entr(probs).sum(-1) + entr(share.clamp(min=0))
        torch.testing.assert_close(found.attention[layer], entropy, atol=2e-5, rtol=0)
    logp = out.logits.log_softmax(-1)
    torch.testing.assert_close(found.entropy, entr(logp.exp()).sum(-1), atol=1e-5, rtol=0)
    own = logp[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.logprobs, own, atol=1e-5, rtol=0)
    assert torch.equal(found.routes, ours.routes(tokens))
    load = expert_load(found.routes, 5)
    assert torch.equal(load[1], torch.bincount(routed[1][2].flatten(), minlength=5))


def test_packed_documents_and_few_queries_at_a_time(monkeypatch):
    """Packed, each document is as it is alone; and the model has no hook left."""
    model = twins(tiny_config())[0]
    tokens, _ = batch(model.config, 1, 20)
    documents = packed([8, 12], [0, 1])[None]
    whole, first, second = (
        inspect(model, tokens, documents), inspect(model, tokens[:, :8]),
        inspect(model, tokens[:, 8:]),
    )  # fmt: skip
    for name in ("sinks", "attention"):
        alone = torch.cat([getattr(part, name) for part in (first, second)], dim=-1)
        torch.testing.assert_close(getattr(whole, name), alone, atol=1e-5, rtol=0)
    assert torch.equal(whole.routes, torch.cat((first.routes, second.routes), dim=2))
    monkeypatch.setattr(inspection, "SCORES", 6 * 20 * 3)  # three queries
    torch.testing.assert_close(inspect(model, tokens, documents), whole)
    modules = list(model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_the_definition_of_attention():
    """With values that are one, attention's output is what the sinks leave."""
    q, k = torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8)
    sinks = torch.randn(4)
    for window in (None, 3):
        out = dense_attention(q, k, torch.ones_like(k), sinks, window)  # (B, S, H, D)
        share, _ = sink_shares(q, k, sinks, window)
        torch.testing.assert_close(1 - share, out[..., 0].transpose(1, 2))


@pytest.mark.parametrize("folder", ["runs/whole", "runs/young/states/step-00000010"])
def test_command(folders, folder, capsys):
    bench.main(["--inspect", str(folders / folder), "naïve\x1b"])
    printed = capsys.readouterr().out
    model = sample.locate(folders / folder, torch.device("cpu")).load()
    tokens = torch.tensor([list("naïve\x1b".encode())])
    found = inspect(model, tokens)
    assert f"entropy {found.entropy.mean():.2f} nats on average" in printed
    lines = [line.split() for line in printed.splitlines()]
    by_layer = [line for line in lines if line and line[0] in ("0", "1", "2")]
    assert [line[1] for line in by_layer] == ["7", "all", "7"]
    assert [line[2] for line in by_layer] == [f"{x:.1%}" for x in found.sinks.mean((1, 2, 3))]
    busiest = expert_load(found.routes, 5)[1].argmax().item()
    assert by_layer[1][9] == f"{busiest}:", printed
    assert "\x1b" not in printed and "'n'" in printed
    (first,) = [line for line in lines if line and line[0] == "'n'"]
    routes = [str(e) for e in found.routes[:, 0, 0].flatten().tolist()]
    assert first[-6:] == routes


def test_long_texts_and_mistakes(folders, capsys, tmp_path):
    bench.main(["--inspect", str(folders / "runs/whole"), "x" * 40])
    assert "... and 16 tokens more" in capsys.readouterr().out
    bench.main(["--inspect", str(folders / "runs/whole"), "x"])
    assert "loss of the text" not in capsys.readouterr().out
    for folder, text, message in (
        ("runs/whole", "", "a text of 0 tokens: .*runs/whole takes 1 to 128"),
        ("runs/whole", "x" * 129, "a text of 129 tokens"),
        ("runs/none", "x", "runs/none: no such folder"),
        ("runs/young", "x", "this run has no model/ yet"),
    ):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            bench.main(["--inspect", str(folders / folder), text])


def test_a_vocabulary_that_is_too_small(folders):
    need_vocabulary()
    with pytest.raises(SystemExit, match="vocabulary of 300 is smaller than that of o200k_harmony"):
        bench.main(["--inspect", str(folders / "converted"), "x"])


def test_a_model_in_bf16_of_many_experts():
    config = GPTOSSConfig(
        num_hidden_layers=2, num_experts=32, vocab_size=64, hidden_size=32, intermediate_size=32,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    found = inspect(GPTOSS(config).bfloat16(), torch.arange(9)[None])
    assert found.sinks.dtype == found.attention.dtype == torch.float32
    # sinks and scores near zero: the share of one among `visible + 1` equals
    visible = torch.arange(1, 10)
    expected = torch.stack((1 / (visible.clamp(max=4) + 1), 1 / (visible + 1)))
    torch.testing.assert_close(found.sinks[:, 0, 0], expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(found.attention[:, 0, 0].exp(), 1 / expected, atol=0.1, rtol=0)
