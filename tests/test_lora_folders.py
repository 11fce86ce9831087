"""Folders with adapters: saved and found again, merged, exported for PEFT and transformers."""

import dataclasses
import json
import re
import warnings

import pytest
import torch

import convert_hf
import lora
from common import batch, hugging_face_config, noise_, relative
from convert_hf import HUGGING_FACE, counterparts
from lora_models import (
    CONFIG,
    EVERYTHING,
    model_without_adapters,
    step,
    unpacked_twin,
    write_adapters,
    write_base,
)
from model import GPTOSS, GPTOSSConfig
from weights import find_model

# --------------------------------------------------------------------------------------------------
# Ours


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "packed"])
def test_adapters_come_back_on_their_base(tmp_path, packed):
    base = write_base(tmp_path / "base", packed)
    model = write_adapters(tmp_path / "run" / "model", base)
    again = lora.from_checkpoint(tmp_path / "run" / "model", dtype=torch.float32)
    tokens = batch(CONFIG, 2, 29)
    assert torch.equal(model(tokens[0]), again(tokens[0]))
    assert step(model, tokens).keys() == step(again, tokens).keys()
    assert hasattr(again.blocks[0].mlp, "down_weight_blocks") == packed
    found = find_model(tmp_path / "run")
    assert (found.layout, found.weights) == ("adapters", tmp_path / "run" / "model")


def test_a_packed_folder_fills_a_plain_model(tmp_path):
    base = write_base(tmp_path / "base", packed=True)
    model, plain = lora.from_checkpoint(base), GPTOSS.from_checkpoint(base)
    assert plain.blocks[0].mlp.down_weight.dtype == torch.bfloat16
    twin = unpacked_twin(model)
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_another_base_is_an_error(tmp_path):
    base, run = write_base(tmp_path / "base"), tmp_path / "run" / "model"
    write_adapters(run, base)
    write_base(tmp_path / "base", seed=1)
    with pytest.raises(ValueError, match="holds other weights than those that the adapters were"):
        lora.from_checkpoint(run)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match='base is not there; "base" may name another place'):
        lora.from_checkpoint(run)
    settings = json.loads((run / "adapters.json").read_text())
    settings["base"] = str(write_base(tmp_path / "again"))  # the same weights, in another place
    (run / "adapters.json").write_text(json.dumps(settings))
    lora.from_checkpoint(run)
    (run / "adapters.json").write_text(json.dumps(settings | {"rank": "3"}))
    with pytest.raises(ValueError, match="rank is '3', not a int"):
        lora.from_checkpoint(run)
    (run / "adapters.json").write_text(json.dumps(settings | {"rank": 4}))
    with pytest.raises(ValueError, match="does not fit the model"):
        lora.from_checkpoint(run)


def test_adapters_replace_only_adapters(tmp_path):
    base, run = write_base(tmp_path / "base"), tmp_path / "run"
    write_adapters(run, base)
    model = write_adapters(run, base, "qkv")
    assert lora.from_checkpoint(run).state_dict().keys() == model.state_dict().keys()
    before = sorted(path.name for path in base.iterdir())
    with pytest.raises(ValueError, match="holds something other than adapters"):
        write_adapters(base, base)
    assert sorted(path.name for path in base.iterdir()) == before


@pytest.mark.parametrize("packed", [False, True], ids=["bf16", "packed"])
def test_merged_places(tmp_path, packed):
    """Slice by slice what the adapted model computes with, in bf16: W + scale A B, rounded once."""
    base = write_base(tmp_path / "base", packed)
    model = write_adapters(tmp_path / "run", base)
    places, problems = lora.places(tmp_path / "run")
    plain = unpacked_twin(model_without_adapters(model)) if packed else GPTOSS.from_checkpoint(base)
    assert not problems and places.keys() == dict(plain.named_parameters()).keys()
    for name, p in plain.float().named_parameters():
        place, stem = places[name], name.removesuffix("weight")
        expected = lora.adapters(model).get(name, p).detach()
        if f"{stem}lora_a" in lora.adapters(model):
            a, b = (lora.adapters(model)[f"{stem}lora_{x}"].detach() for x in "ab")
            expected = expected + 2 * (b @ a if a.dim() == 2 else a @ b)
        assert place.shape == expected.shape and place.dtype == torch.bfloat16
        whole = torch.cat([place[i : i + 3] for i in range(0, len(expected), 3)])
        torch.testing.assert_close(whole, expected.bfloat16(), rtol=2**-7, atol=0)
        assert (whole != expected.bfloat16()).float().mean() < 0.01, name


def test_identity_sees_every_tensor(tmp_path):
    model = noise_(GPTOSS(CONFIG))
    model.save_checkpoint(tmp_path / "0")
    first, seen = lora.identity(tmp_path / "0"), set()
    some = list(model.parameters())[::5]
    for parameter in some:
        parameter.data.flatten()[-1] += 1
        model.save_checkpoint(tmp_path / "1")
        seen.add(lora.identity(tmp_path / "1"))
    assert first not in seen and len(seen) == len(some)


# --------------------------------------------------------------------------------------------------
# Of PEFT and transformers


def transformers_twin(base):
    """transformers' model with the weights of the checkpoint folder `base`, in fp32."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    theirs = hugging_face_config(
        CONFIG, attn_implementation="eager", experts_implementation="eager"
    )
    theirs = transformers.GptOssForCausalLM(theirs)
    for layer in theirs.model.layers:
        layer.mlp.experts.limit = CONFIG.swiglu_limit
    plain, state = GPTOSS.from_checkpoint(base, dtype=torch.float32).state_dict(), {}
    for pair in counterparts(CONFIG, HUGGING_FACE, False):
        state |= zip(pair.theirs, pair.to_theirs(plain[pair.name]))
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.parametrize(
    "targets, layers",
    [("attention", ""), (EVERYTHING, ""), ("down,router,unembedding", "1"), ("all", "0,2")],
)
def test_peft_loads_adapters(tmp_path, targets, layers):
    """On transformers' model, with our logits."""
    peft = pytest.importorskip("peft", reason="PEFT is the reference: pip install peft")
    base = write_base(tmp_path / "base")
    model = write_adapters(tmp_path / "run", base, targets, layers)
    convert_hf.main(
        ["--export", str(tmp_path / "run"), "--out", str(tmp_path / "peft"), "--adapter"]
    )
    tokens, _ = batch(CONFIG, 2, 29)
    theirs = transformers_twin(base)
    before = theirs(tokens).logits.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing and unexpected keys PEFT only warns
        for kind in DeprecationWarning, FutureWarning:
            warnings.filterwarnings("ignore", category=kind)
        theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    logits = theirs(tokens).logits
    assert relative(logits, model(tokens)) < 1e-5
    assert relative(before, logits) > 1e-2


def test_peft_finds_the_base_that_is_named(tmp_path, capsys, monkeypatch):
    """It opens a folder of transformers', not ours, and computes our logits."""
    peft = pytest.importorskip("peft", reason="PEFT is the reference: pip install peft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT would look for a tokenizer there
    base, theirs = write_base(tmp_path / "base"), str(tmp_path / "theirs")
    model = write_adapters(tmp_path / "run", base)
    convert_hf.main(["--export", str(base), "--out", theirs])
    for out, given in ("named", [f"--base={theirs}"]), ("unnamed", []):
        capsys.readouterr()
        convert_hf.main(["--export", "run", "--out", out, "--adapter", *given])
        config = (tmp_path / out / "adapter_config.json").read_text()
        name = json.loads(config)["base_model_name_or_path"]
        said = capsys.readouterr().out
        assert name == (theirs if given else None) and (str(base) not in config)
        assert said.endswith(f"model of {theirs}\n" if given else "give --base\n")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    found = peft.AutoPeftModelForCausalLM.from_pretrained("named", dtype=torch.float32, **eager)
    for layer in found.base_model.model.model.layers:
        layer.mlp.experts.limit = CONFIG.swiglu_limit
    tokens, _ = batch(CONFIG, 2, 29)
    assert relative(found(tokens).logits, model(tokens)) < 1e-5
    for wrong in ["--adapter", "--base="], [f"--base={theirs}"]:
        with pytest.raises(SystemExit):
            convert_hf.main(["--export", "run", "--out", "out", *wrong])
        assert "--base names the model that an export with --adapter" in capsys.readouterr().err


def test_released_models_are_known_by_name_and_sizes():
    """A model of their sizes with another name may have been trained further."""
    small = GPTOSSConfig()
    large = dataclasses.replace(small, num_hidden_layers=36, num_experts=128)
    for folder, config, name in [
        ("checkpoints/gpt-oss-20b", small, "openai/gpt-oss-20b"),
        ("/disk/gpt-oss-20b-packed", small, "openai/gpt-oss-20b"),
        ("checkpoints/gpt-oss-120b", large, "openai/gpt-oss-120b"),
        ("checkpoints/gpt-oss-120b", small, None),
        ("checkpoints/gpt-oss-20b", dataclasses.replace(small, hidden_size=64), None),
        ("runs/mine/model", small, None),
    ]:
        assert lora.released(folder, config) == name


def test_what_is_no_adapter_is_not_exported_as_one(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    with pytest.raises(SystemExit, match="holds no adapters: export it without --adapter"):
        convert_hf.main(["--export", str(base), "--out", str(tmp_path / "out"), "--adapter"])
    for more in "--mxfp4", "--state=best":
        with pytest.raises(SystemExit):
            convert_hf.main(["--export", str(base), "--out", "out", "--adapter", more])
        assert "--adapter writes a finished run's adapters as they are" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "packed"])
def test_a_merged_export(tmp_path, packed):
    """transformers' logits of it are ours with the merged weights, on a base in fp32 also those of
    the adapted model, whose merged weights are not rounded."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    base = tmp_path / "base"
    write_base(base, True) if packed else noise_(GPTOSS(CONFIG)).save_checkpoint(base)
    model = write_adapters(tmp_path / "run", base)
    convert_hf.main(["--export", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    for layer in theirs.model.layers:
        layer.mlp.experts.limit = CONFIG.swiglu_limit
    tokens, _ = batch(CONFIG, 2, 29)
    merged = GPTOSS(CONFIG)
    merged.load_state_dict(
        {n: place[:].float() for n, place in lora.places(tmp_path / "run")[0].items()}
    )
    logits = theirs(tokens).logits
    assert relative(logits, merged(tokens)) < 1e-5
    assert packed or relative(logits, model(tokens)) < 1e-5
    unmerged = lora.from_checkpoint(base, dtype=torch.float32)
    assert relative(unmerged(tokens), logits) > 0.1


@pytest.mark.parametrize("targets", [EVERYTHING, "attention"])
def test_a_merged_export_in_mxfp4(targets, tmp_path, capsys):
    """The printed error is that of the experts as they are imported again: none of a packed base's
    that no adapter changes."""
    write_adapters(tmp_path / "run", write_base(tmp_path / "base", True), targets)
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    convert_hf.main(["--export", str(tmp_path / "run"), "--out", out, "--mxfp4"])
    printed = float(re.search(r"MXFP4 experts: relative error (\S+)", capsys.readouterr().out)[1])
    convert_hf.main([out, "--out", again])
    (merged, _), (found, _) = lora.places(tmp_path / "run"), lora.places(again)
    errors, weights = 0, 0
    for name, place in merged.items():
        expected, actual = place[:].float(), found[name][:].float()
        if name.endswith(("gate_up_weight", "down_weight")):
            errors += (actual - expected).square().sum()
            weights += expected.square().sum()
        else:
            assert torch.equal(actual, expected), name
    assert printed == pytest.approx((errors / weights).sqrt().item(), rel=1e-3)
    assert (printed == 0) == (targets == "attention") and printed < 0.2
