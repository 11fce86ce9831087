"""weights.py and shards.py: what a config.json means, what a folder holds, and what must not load.

transformers is the reference for its own config.json: what is accepted must mean the same there.
"""

import errno
import inspect
import json
import math
import os
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import folders
import shards
import weights
from common import hugging_face_config, noise_, tiny_config
from model import GPTOSS, GPTOSSConfig
from weights import find_model, hf_config, read_config

ORIGINAL = {  # gpt-oss-20b's original/config.json, which leaves out the two fields without a choice
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
INDEX_FILE = "model.safetensors.index.json"


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def read(folder, given):
    return read_config(write(folder / "config.json", given), GPTOSSConfig)


# --------------------------------------------------------------------------------------------------
# config.json: ours and OpenAI's


def test_config_of_openai(tmp_path):
    assert read(tmp_path, ORIGINAL) == GPTOSSConfig()


def test_config_of_ours(tmp_path):
    config, path = tiny_config(rope_ntk_alpha=1.5, rms_norm_eps=1e-6), tmp_path / "config.json"
    config.to_json(path)
    assert json.loads(path.read_text()) == asdict(config)
    assert GPTOSSConfig.from_json(path) == config


def test_config_files_that_are_wrong(tmp_path):
    ours = asdict(GPTOSSConfig())
    text = {
        "absent": None,
        "text": "{not json",
        "bytes": b"\xff\xfe{",
        "deep": "[" * 100_000,
        "digits": '{"vocab_size": ' + "9" * 5000 + "}",
        "list": "[1]",
        "more": json.dumps({**ours, "num_layers": 3}),
        "many": json.dumps({**ours, **{f"key{i:05d}": 1 for i in range(20_000)}}),
        "fewer": '{"head_dim": 64, "hidden_size": 3}',
        "zero": json.dumps({**ours, "num_experts": 0}),
        "infinite": json.dumps(ours).replace("32.0", "1e999"),
        "long": json.dumps({**ours, "head_dim": [1] * 100_000}),
        "huge": json.dumps({**ours, "rope_theta": 10**400}),
        "index": json.dumps({**ours, "num_hidden_layers": 20_000}),
    }
    messages = {
        "absent": "absent.json: not a readable absent.json .*No such file",
        "text": "text.json: not a readable",
        "bytes": "bytes.json: not a readable",
        "deep": "deep.json: not a readable",
        "digits": "digits.json: not a readable",
        "list": "list.json: expected a JSON object, found list",
        "more": r"these fields are wrong: unknown: num_layers$",
        "many": r"unknown: key00009\n  and 19990 more$",
        "fewer": r"(?s)wrong:\n  missing: experts_per_token\n.*missing: num_experts\n.*more$",
        "zero": "zero.json: num_experts=0 must be a positive number",
        "infinite": "=inf must be a positive number",
        "long": r"head_dim=\[1, 1, 1, 1, 1, 1, \.\.\.\] must be",
        "huge": "huge.json: ",
        "index": "index.json: it speaks of 20000 layers, and there are 1 tensors",
    }
    assert text.keys() == messages.keys()
    write(tmp_path / INDEX_FILE, {"weight_map": {"norm.weight": "a"}})
    for name, content in text.items():
        path = tmp_path / f"{name}.json"
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError, match=messages[name]) as error:
            GPTOSSConfig.from_json(path)
        assert len(str(error.value)) < 600, name


# --------------------------------------------------------------------------------------------------
# config.json: Hugging Face's


def hugging_face_json(folder, config):
    """[the config.json that transformers writes, the same in the style before transformers 5]."""
    hugging_face_config(config).save_pretrained(folder)
    new, old = (json.loads((folder / "config.json").read_text()) for _ in range(2))
    old["rope_scaling"] = old.pop("rope_parameters")
    old["rope_theta"] = old["rope_scaling"].pop("rope_theta")
    old["initial_context_length"] = old["rope_scaling"]["original_max_position_embeddings"]
    return [new, old]


def as_transformers_reads(given):
    """What transformers computes with a config.json: sizes, kinds of layers, rotary frequencies."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    transformers.logging.set_verbosity_error()
    config = transformers.GptOssConfig.from_dict(json.loads(json.dumps(given)))
    rope_type = config.rope_parameters["rope_type"]
    frequencies, temperature = ROPE_INIT_FUNCTIONS[rope_type](config, "cpu")
    # an older transformers computes with the value of a key that it does not have yet
    older = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
    names = (*weights.READ, *weights.FIXED)
    meaning = {name: getattr(config, name, older.get(name)) for name in names}
    meaning |= {"layer_types": config.layer_types, "rope_type": rope_type}
    return meaning | {"frequencies": frequencies.tolist(), "temperature": temperature}


def assert_same_meaning(given, config):
    """`config`, which we read from `given`, is to transformers what `given` is."""
    theirs = as_transformers_reads(given)
    ours = as_transformers_reads(hugging_face_config(config).to_dict())
    for name, expected in theirs.items():
        if name in ("frequencies", "temperature", "rms_norm_eps", "swiglu_limit"):
            expected = pytest.approx(expected, rel=1e-6)
        assert ours[name] == expected, name


def edit(given, change):
    """`given` with changes: "rope.x" is x in the rotary settings, None removes, ... is null."""
    given = json.loads(json.dumps(given))
    rotary = given.get("rope_parameters") or given["rope_scaling"]
    for name, value in change.items():
        place = given
        if name.startswith("rope."):
            place, name = rotary, name[5:]
        if value is None:
            place.pop(name, None)
        else:
            place[name] = None if value is ... else value
    return given


@pytest.mark.parametrize("style", [0, 1], ids=["transformers 5", "transformers 4"])
def test_every_key_that_is_read_changes_its_field(style, tmp_path):
    config = tiny_config(sliding_window=19, rope_ntk_alpha=1.5, rope_ntk_beta=24.0)
    given = hugging_face_json(tmp_path, config)[style]
    assert read(tmp_path, given) == config
    assert_same_meaning(given, config)
    other = asdict(GPTOSSConfig(2, 6, 1, 62, 22, 14, 10, 12, 6, 8, 2.5, 32, 2e3, 5.0, 1.25, 20, 300,
                                1e-4))  # fmt: skip
    for name, (field, _) in (weights.READ | weights.READ_ROPE).items():
        rotary = name in weights.READ_ROPE and not (style and name == "rope_theta")
        change = {f"rope.{name}" if rotary else name: other[field]}
        if field == "num_hidden_layers":
            change["layer_types"] = None
        for again, repeated in weights.RESTATED.items():
            if repeated == field and again in given:
                change[again] = other[field]
        found = read(tmp_path, edit(given, change))
        assert found == replace(config, **{field: other[field]}), name
        assert getattr(found, field) != getattr(config, field)
        if name != "num_attention_heads":  # 6 key-value heads fit either
            assert_same_meaning(edit(given, change), found)


ACCEPTED = {  # what only says again, in another place or not at all, what transformers assumes
    "no head_dim": {"head_dim": None, "hidden_size": 2880},
    "no sliding_window": {"sliding_window": None},
    "no expert counts": {"num_local_experts": None, "num_experts_per_tok": None},
    "no layer_types": {"layer_types": None},
    "layer_types null": {"layer_types": ...},
    "no swiglu_limit": {"swiglu_limit": None},
    "no rms_norm_eps": {"rms_norm_eps": None},
    "no context": {"max_position_embeddings": None},
    "experts under OpenAI's name": {"num_local_experts": None, "num_experts": 5},
    "both names": {"num_experts": 5, "experts_per_token": 2},
    "no rope_theta": {"rope.rope_theta": None},
    "rope_theta at the top level": {"rope.rope_theta": None, "rope_theta": 1000.0},
    "rope_theta twice": {"rope_theta": 1000.0, "rope.rope_theta": 1000.0},
    "no betas": {"rope.beta_fast": None, "rope.beta_slow": None},
    "betas null": {"rope.beta_fast": ..., "rope.beta_slow": ...},
    "factor null": {"rope.factor": ...},
    "type": {"rope.rope_type": None, "rope.type": "yarn"},
    "type and rope_type": {"rope.type": "yarn"},
    "attention_factor null": {"rope.attention_factor": ...},
    "the default attention_factor": {"rope.attention_factor": 0.1 * math.log(4) + 1},
    "mscale alone": {"rope.mscale": 0.7},
    "mscale that gives the default": {"rope.mscale": 1.0, "rope.mscale_all_dim": 1e-30},
    "whole rotary": {"rope.partial_rotary_factor": 1.0, "partial_rotary_factor": 1.0},
    "no initial context": {"rope.original_max_position_embeddings": None},
    "no rotary settings": {"rope_parameters": None, "initial_context_length": 4096},
    "rotary settings null": {"rope_parameters": ...},
    "both rotary settings": {"rope_scaling": ...},  # set below
    "no dropout": {"attention_dropout": 0},
    "no attention_bias": {"attention_bias": None},
    "no alpha": {"swiglu_alpha": None},
    "no hidden_act": {"hidden_act": None},
    "a key nobody knows": {"unsloth_version": "1"},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_restates_a_default_is_accepted(case, tmp_path):
    given = edit(hugging_face_json(tmp_path, tiny_config())[0], ACCEPTED[case])
    if case == "both rotary settings":
        given["rope_scaling"] = given["rope_parameters"]
    assert_same_meaning(given, read(tmp_path, given))


def test_head_dim_null_is_the_hidden_size_over_the_heads(tmp_path):
    """So transformers 4 says; 5 refuses it."""
    given = hugging_face_json(tmp_path, tiny_config(hidden_size=24))[0]
    change = {"head_dim": ..., "num_key_value_heads": ...}
    config = read(tmp_path, edit(given, change))
    assert (config.head_dim, config.num_key_value_heads) == (4, 6)


REFUSED = {  # what model.py does not compute, and contradictions
    "another model": ({"model_type": "llama"}, "model_type is 'llama'"),
    "tied embeddings": ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
    "no biases": ({"attention_bias": False}, "attention_bias is False"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    "alpha": ({"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5"),
    "kinds of layers": ({"layer_types": ["full_attention"] * 3}, "layer_types is"),
    "few kinds": ({"layer_types": ["sliding_attention"]}, "number of layer_types is 1"),
    "no kinds": ({"layer_types": []}, "number of layer_types is 0"),
    "kinds that are none": ({"layer_types": 3}, "layer_types is 3"),
    "no list of that length is made": ({"num_hidden_layers": 10**30}, "number of layer_types is 3"),
    "window null": ({"sliding_window": ...}, "sliding_window=None must be"),
    "rounded ramp": ({"rope.truncate": True}, "truncate is True"),
    "rounded ramp by default": ({"rope.truncate": None}, "truncate is None"),
    "another rope": ({"rope.rope_type": "llama3"}, "rope_type is 'llama3'"),
    "another old rope": ({"rope.type": "linear"}, "type is 'linear'"),
    "plain rope": ({"rope_parameters": {}, "rope_scaling": None}, "rope_type is None"),
    "attention_factor": ({"rope.attention_factor": 1.0}, "attention factor is 1.0"),
    "mscale": ({"rope.mscale": 1.0, "rope.mscale_all_dim": 0.5}, "attention factor is 1.06"),
    "partial rope": ({"rope.partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "partial rope outside": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "factor below one": ({"rope.factor": 0.5}, "attention factor is None and factor 0.5"),
    "of other ropes": ({"rope.short_factor": [1.0]}, r"rotary settings \['short_factor'\]"),
    "rope per kind": ({"rope.full_attention": {}}, r"rotary settings \['full_attention'\]"),
    "two rope_thetas": ({"rope_theta": 3.0, "rope.rope_theta": 1000.0}, "rope_theta is 3.0, but"),
    "two expert counts": ({"num_experts": 6}, "num_experts is 6, but elsewhere 5"),
    "two active counts": ({"experts_per_token": 3}, "experts_per_token is 3, but elsewhere 2"),
    "two contexts": ({"initial_context_length": 17}, "initial_context_length is 17, but"),
    "two contexts outside": (
        {"original_max_position_embeddings": 17}, "original_max_position_embeddings is 17, but",
    ),
    "two rotary settings": ({"rope_scaling": {"factor": 3.0}, "rope_parameters": {"factor": 4.0}},
                            "expected one JSON object"),
    "rotary settings of another type": ({"rope_parameters": [1], "rope_scaling": None}, "one JSON"),
}  # fmt: skip


@pytest.mark.parametrize("style", [0, 1], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_model_py_does_not_compute_is_refused(case, style, tmp_path):
    change, message = REFUSED[case]
    given = edit(hugging_face_json(tmp_path, tiny_config())[style], change)
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        read(tmp_path, given)


def test_rope_scaling_null_is_refused(tmp_path):
    """No YaRN to transformers 4, the default to transformers 5."""
    given = hugging_face_json(tmp_path, tiny_config())[1] | {"rope_scaling": None}
    with pytest.raises(ValueError, match="rope_scaling is None"):
        read(tmp_path, given)


def test_refused_values_would_have_changed_the_rotary_tables(tmp_path):
    """The negative control of the comparison: it tells these values from the default."""
    given = hugging_face_json(tmp_path, tiny_config())[0]
    for case in ("attention_factor", "mscale", "rounded ramp", "partial rope", "two rope_thetas"):
        with pytest.raises(AssertionError):
            assert_same_meaning(edit(given, REFUSED[case][0]), tiny_config(rope_theta=3.0))


def test_harmless_keys_change_nothing(tmp_path):
    config = tiny_config()
    for style in hugging_face_json(tmp_path, config):
        for name in weights.HARMLESS:
            assert read(tmp_path, style | {name: "anything"}) == config, name
        assert weights.unread_keys(style) == []
        assert weights.unread_keys(style | {"unsloth_version": 1}) == ["unsloth_version"]


VERSION_4 = (  # the signature of transformers 4.57's GptOssConfig
    "num_hidden_layers num_local_experts vocab_size hidden_size intermediate_size head_dim "
    "num_attention_heads num_key_value_heads sliding_window rope_theta tie_word_embeddings "
    "hidden_act initializer_range max_position_embeddings rms_norm_eps rope_scaling "
    "attention_dropout num_experts_per_tok router_aux_loss_coef output_router_logits use_cache "
    "layer_types"
)


def test_every_key_of_transformers_is_in_a_table():
    """A key of a newer transformers that no table names may change what is computed: look it up in
    its modeling_gpt_oss.py, and add it."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    keys = {*inspect.signature(transformers.GptOssConfig).parameters, *VERSION_4.split()} - {
        "kwargs"
    }
    tables = [weights.READ, weights.RESTATED, weights.FIXED, weights.STRUCTURED, weights.HARMLESS]
    assert keys - set().union(*tables) == set()
    assert not set(weights.HARMLESS) & set().union(*tables[:4])
    assert weights.READ.keys().isdisjoint(weights.FIXED)
    from transformers.modeling_rope_utils import RopeParameters

    other_ropes = {"short_factor", "long_factor", "low_freq_factor", "high_freq_factor"}
    other_ropes |= {"mrope_section"}
    rotary = {*weights.READ_ROPE, *weights.FIXED_ROPE, *weights.ROPE_TEMPERATURE}
    assert RopeParameters.__annotations__.keys() - rotary - {"partial_rotary_factor"} <= other_ropes
    defaults = inspect.signature(transformers.GptOssConfig).parameters
    for name, (_, default) in weights.READ.items():
        if name in defaults:  # swiglu_limit is younger than transformers 5.17
            assert defaults[name].default == default, name
    for name, value in weights.FIXED.items():
        if name in defaults:
            assert defaults[name].default == value, name


def test_exported_config_says_what_the_released_one_says():
    """The fields of openai/gpt-oss-20b that decide what is computed and how vLLM loads it."""
    transformers = pytest.importorskip("transformers", reason="transformers is the reference")
    config = hf_config(
        GPTOSSConfig(), torch.bfloat16, True, {"rope_parameters": {"factor": 1.0}, "dtype": "fp32"}
    )
    released = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True,
        "attention_dropout": 0.0, "eos_token_id": 200002, "pad_token_id": 199999, "head_dim": 64,
        "hidden_act": "silu", "hidden_size": 2880, "intermediate_size": 2880,
        "num_attention_heads": 64, "num_experts_per_tok": 4, "experts_per_token": 4,
        "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "initial_context_length": 4096,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn",
                         "truncate": False},
        "rope_theta": 150000, "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "vocab_size": 201088,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
            "lm_head"]},
    }  # fmt: skip
    assert {name: config[name] for name in released} == released
    assert not {"rope_parameters", "dtype", "num_experts"} & config.keys()
    rope = transformers.GptOssConfig(**config).rope_parameters
    assert rope == released["rope_scaling"] | {"rope_theta": 150000}


def test_what_is_written_is_read_again(tmp_path):
    config = GPTOSSConfig(2, 6, 1, 62, 22, 14, 10, 12, 6, 8, 2.5, 32, 2e3, 5.0, 1.25, 20, 300, 1e-4)
    given = hf_config(config, torch.float32, False, {"eos_token_id": 7})
    assert read(tmp_path, given) == config and given["eos_token_id"] == 7
    assert given["torch_dtype"] == "float32" and "quantization_config" not in given
    assert_same_meaning(given, config)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, 1, 2, 4, 16, 64, 1e-5, 10**30, 10**400, "yarn", "silu"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
KEYS = sorted({*weights.READ, *weights.RESTATED, *weights.FIXED, *weights.STRUCTURED})
ROTARY = sorted({*weights.READ_ROPE, *weights.FIXED_ROPE, *weights.ROPE_TEMPERATURE, "type"})


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3),
       st.dictionaries(st.sampled_from(ROTARY), ANYTHING, max_size=2), st.booleans())  # fmt: skip
@example({"num_hidden_layers": 10**400}, {}, False)
@example({"layer_types": 3, "head_dim": None, "hidden_size": "x"}, {}, True)
@example({}, {"factor": None, "original_max_position_embeddings": "4"}, True)
@example({"max_position_embeddings": None}, {"factor": None}, True)
@example({"partial_rotary_factor": False}, {}, False)
def test_any_type_in_any_key_is_a_configuration_or_one_error(tmp_path, top, rotary, old):
    """And where transformers reads it as well, both read the same."""
    given = hf_config(tiny_config(), torch.float32, False, {})
    if not old:
        given["rope_parameters"] = given.pop("rope_scaling") | {
            "rope_theta": given.pop("rope_theta")
        }
    given[("rope_parameters", "rope_scaling")[old]] |= rotary
    given |= top
    try:
        config = read(tmp_path, given)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path}/config.json: ") and len(str(error)) < 1000
        return
    try:
        meaning = as_transformers_reads(given)
    except Exception:  # it is stricter about types
        return
    assert meaning
    assert_same_meaning(given, config)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.sampled_from([*ORIGINAL, "max_position_embeddings", "other"]), ANYTHING,
                       max_size=3))  # fmt: skip
def test_any_type_in_any_field_of_ours(tmp_path, change):
    try:
        config = read(tmp_path, ORIGINAL | change)
    except ValueError as error:
        assert str(error).startswith(f"{tmp_path}/config.json: ") and len(str(error)) < 1000
    else:
        assert asdict(config) == pytest.approx(asdict(GPTOSSConfig()) | change)


# --------------------------------------------------------------------------------------------------
# Checkpoint folders


def assert_same_weights(a, b):
    theirs = dict(b.named_parameters())
    assert theirs.keys() == dict(a.named_parameters()).keys()
    for name, x in a.named_parameters():
        assert x.dtype == theirs[name].dtype and torch.equal(x, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 10_000])
def test_checkpoint_round_trip(shard_bytes, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", shard_bytes)
    model = noise_(GPTOSS(tiny_config())).to(dtype)
    folder = tmp_path / "runs" / "checkpoint"
    model.save_checkpoint(folder)
    again = GPTOSS.from_checkpoint(folder)
    assert again.config == model.config
    assert_same_weights(again, model)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {
        file.name: sum(t.nbytes for t in load_file(file).values())
        for file in folder.glob("*.safetensors")
    }
    assert (
        index["metadata"]["total_size"]
        == sum(sizes.values())
        == sum(p.nbytes for p in model.parameters())
    )
    assert set(sizes) == {
        f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)
    }
    assert set(index["weight_map"].values()) == set(sizes)
    assert (
        (len(sizes) > 3 and max(sizes.values()) <= 10_000)
        if shard_bytes == 10_000
        else len(sizes) == 1
    )
    assert os.listdir(folder.parent) == ["checkpoint"]  # nothing half-written is left beside it
    for wanted in (torch.float32, torch.bfloat16):
        assert_same_weights(GPTOSS.from_checkpoint(folder, dtype=wanted), model.to(wanted))


def test_checkpoint_in_another_dtype(tmp_path):
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path / "half", dtype=torch.bfloat16)
    assert_same_weights(GPTOSS.from_checkpoint(tmp_path / "half"), model.bfloat16())


def test_checkpoint_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    noise_(GPTOSS(tiny_config(num_hidden_layers=5))).save_checkpoint(tmp_path / "last")
    left = tmp_path / f".last.partial-{folders.machine()}-00000000"  # of a run that was killed
    left.mkdir()
    (left / "rubbish").touch()
    model = noise_(GPTOSS(tiny_config()), seed=1)
    model.save_checkpoint(tmp_path / "last")
    assert_same_weights(GPTOSS.from_checkpoint(tmp_path / "last"), model)
    assert os.listdir(tmp_path) == ["last"]
    files = set(
        json.loads((tmp_path / "last" / "model.safetensors.index.json").read_text())[
            "weight_map"
        ].values()
    )
    assert set(os.listdir(tmp_path / "last")) == files | {
        "config.json",
        "model.safetensors.index.json",
    }


def test_checkpoint_does_not_replace_something_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    with pytest.raises(ValueError, match="something other than a checkpoint"):
        model.save_checkpoint(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    (tmp_path / "empty").mkdir()
    model.save_checkpoint(tmp_path / "empty")


def test_load_weights_lists_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 10_000)
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = index["weight_map"]

    def rewrite(name, change):  # the file that holds `name`
        path = tmp_path / files[name]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    rewrite("norm.weight", lambda t: t.update({"norm.weight": torch.ones(19)}))
    rewrite(
        "blocks.1.attention.sinks", lambda t: t.pop("blocks.1.attention.sinks")
    )  # listed, and not in its file
    truncated = files["blocks.2.mlp.gate_up_weight"]
    (tmp_path / truncated).write_bytes((tmp_path / truncated).read_bytes()[:-100])
    lost = files["blocks.0.mlp.gate_up_weight"]
    (tmp_path / lost).unlink()
    bias = files["blocks.9.extra"] = files.pop("blocks.1.mlp.router.bias")
    assert len({truncated, lost, files["norm.weight"], files["blocks.1.attention.sinks"]}) == 4
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError) as error:
        GPTOSS.from_checkpoint(tmp_path, dtype=torch.float32)
    for problem in (
        "missing: blocks.1.mlp.router.bias",
        "unknown: blocks.9.extra",
        r"norm.weight has shape \(19,\).*\(20,\)",
        f"blocks.1.attention.sinks is in the index, not in {files['blocks.1.attention.sinks']}",
        f"blocks.1.mlp.router.bias is in {bias}, not in the index",
        f"{truncated} is unreadable",
        f"{lost} is unreadable",
    ):
        error.match(problem)


@pytest.mark.parametrize("damage", ["unlisted", "truncated", "lost"])
def test_load_weights_says_so_when_the_norm_is_what_does_not_fit(damage, tmp_path):
    """from_checkpoint looks at this tensor first, for the dtype."""
    noise_(GPTOSS(tiny_config())).save_checkpoint(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = tmp_path / index["weight_map"]["norm.weight"]
    if damage == "unlisted":
        del index["weight_map"]["norm.weight"]
        write(path, index)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    message = "norm.weight is in .*, not in the index" if damage == "unlisted" else file.name
    with pytest.raises(ValueError, match=message):
        GPTOSS.from_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"norm.weight": "../elsewhere.safetensors"}},
        {"weight_map": {"norm.weight": "/etc/passwd"}},
        {"weight_map": {"norm.weight": 3}},
        {"weight_map": ["norm.weight"]},
        {},
        [],
    ],
)
def test_wrong_index(index, tmp_path):
    tiny_config().to_json(tmp_path / "config.json")
    write(tmp_path / "model.safetensors.index.json", index)
    with pytest.raises(ValueError, match="index.json: not a readable index"):
        GPTOSS.from_checkpoint(tmp_path)


def test_checkpoint_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="config.json: not a readable"):
        GPTOSS.from_checkpoint(tmp_path / "absent")


def test_long_lists_show_ten_and_a_count(tmp_path):
    """And a configuration of more layers than tensors is refused before a model is built."""
    noise_(GPTOSS(tiny_config(num_hidden_layers=20))).save_checkpoint(tmp_path)
    with torch.device("meta"):
        small = GPTOSS(tiny_config(num_hidden_layers=2)).to_empty(device="cpu")
    with pytest.raises(ValueError, match="does not fit the model, 234 problems:") as error:
        weights.load_weights(small, tmp_path)
    assert str(error.value).endswith("\n  and 224 more") and str(error.value).count("\n") == 11
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", config | {"num_hidden_layers": 10**9})
    with pytest.raises(ValueError, match="1000000000 layers, and there are 263 tensors"):
        GPTOSS.from_checkpoint(tmp_path)


def test_every_tensor_is_aligned(tmp_path):
    """An fp32 tensor after an odd number of bf16 values: there torch could not view it."""
    places = shards.create_shards(
        tmp_path, {"odd": (torch.bfloat16, (3,)), "wide": (torch.float32, (2, 5))}
    )
    odd, wide = torch.randn(3).bfloat16(), torch.randn(2, 5)
    places["odd"].write(0, odd)
    places["wide"].write(1, wide[1:])
    places["wide"].write(0, wide[:1])
    loaded = load_file(next(tmp_path.glob("*.safetensors")))
    assert torch.equal(loaded["odd"], odd) and torch.equal(loaded["wide"], wide)
    assert places["wide"].offset % 4 == 0


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def cut_to_half(path):
    os.truncate(path, path.stat().st_size // 2)


def lengthen(path):
    with open(path, "ab") as file:
        file.write(b"\0")


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, cut_to_half, lengthen, empty, os.unlink])
def test_a_file_that_changes_after_its_header_was_read(damage, tmp_path, monkeypatch):
    """Its length is compared at every read: what is missing never becomes zeros."""
    model = noise_(GPTOSS(tiny_config()))
    model.save_checkpoint(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    places, _ = shards.read_places(tmp_path)
    again = GPTOSS(tiny_config())
    monkeypatch.setattr(weights, "open_weights", lambda *_: places)
    weights.load_weights(again, tmp_path)
    assert_same_weights(again, model)
    damage(path)
    for place in places.values():
        with pytest.raises(OSError, match=path.name):
            place[:]
    with pytest.raises(OSError, match=path.name):
        weights.load_weights(again, tmp_path)


def test_a_read_error_is_one_error(tmp_path, monkeypatch):
    """A disk that fails in the middle of a tensor. Reads that return less are continued."""
    noise_(GPTOSS(tiny_config())).save_checkpoint(tmp_path)
    places, _ = shards.read_places(tmp_path)
    place, whole = places["embedding.weight"], load_file(next(tmp_path.glob("*.safetensors")))

    class Disk:
        def __init__(self, file, budget):
            self.file, self.budget = file, budget

        def readinto(self, view):
            if self.budget <= 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            count = self.file.readinto(view[: min(len(view), 1000)])
            self.budget -= count
            return count

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    for budget, fails in ((10**9, False), (2000, True)):
        with monkeypatch.context() as patch:
            disk = lambda *a, b=budget, **k: Disk(open(*a, **k), b)  # noqa: E731, SIM115
            patch.setattr(shards, "open", disk, raising=False)
            if fails:
                with pytest.raises(OSError, match=f"cannot read {place.path}: Input/output error"):
                    place[:]
            else:
                assert torch.equal(place[:], whole["embedding.weight"])
    assert torch.equal(place[3:9], whole["embedding.weight"][3:9])
    assert place[61:70].shape == (0, 20)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=4), ANYTHING, max_size=3) | ANYTHING)
@example({"weight_map": {"a": ""}})
@example({"weight_map": {"a": ".."}})
@example({"weight_map": {"a": "b\0c"}})
@example({"weight_map": {"a": ["b"]}})
def test_any_index_is_files_of_the_folder_or_one_error(tmp_path, index):
    for content in (index, {"weight_map": index}):
        write(tmp_path / INDEX_FILE, content)
        try:
            files = shards.weight_files(tmp_path)
        except ValueError as error:
            assert "not a readable index" in str(error)
            continue
        assert all(path.parent == tmp_path and path.name for path in files.values())
        with pytest.raises(ValueError, match="no tensors"):
            shards.read_places(tmp_path)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.dictionaries(st.text(max_size=4), ANYTHING | st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "I64", "F8_E4M3", "x"]) | ANYTHING,
     "shape": st.lists(st.integers(-1, 2**63), max_size=3) | ANYTHING,
     "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2) | ANYTHING}
), max_size=3))  # fmt: skip
def test_any_header_is_tensors_or_a_problem(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
    try:
        places, problems = shards.read_places(tmp_path)
    except ValueError as error:
        assert "no tensors in safetensors files here" in str(error)
    else:
        assert not problems
        with pytest.raises(ValueError, match="does not fit the model"):
            shards.check_places(tmp_path, places, problems, {"norm.weight": (20,)})


def test_unreadable_is_not_absent(tmp_path, monkeypatch):
    """An index that cannot be examined must not be taken for one that is not there: this folder
    would be read by its files, that one be overwritten."""
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    model.save_checkpoint(tmp_path / "model")
    stat = os.stat

    def failing(path, *arguments, **options):
        if str(path).endswith(INDEX_FILE):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return stat(path, *arguments, **options)

    before = sorted(os.listdir(tmp_path / "model"))
    monkeypatch.setattr(os, "stat", failing)
    for attempt in (
        lambda: shards.read_places(tmp_path / "model"),
        lambda: find_model(tmp_path / "model"),
        lambda: GPTOSSConfig.from_json(tmp_path / "model" / "config.json"),
        lambda: model.save_checkpoint(tmp_path / "model"),
    ):
        with pytest.raises(PermissionError, match="Permission denied"):
            attempt()
    assert sorted(os.listdir(tmp_path / "model")) == before


# --------------------------------------------------------------------------------------------------
# What lies in a folder


def their_folder(folder, name, config):
    folder.mkdir(parents=True)
    save_file({name: torch.zeros(3)}, folder / "model.safetensors")
    write(folder / "config.json", config)
    return folder


def test_find_model(tmp_path):
    model = noise_(GPTOSS(tiny_config(num_hidden_layers=1)))
    model.save_checkpoint(tmp_path / "checkpoint")
    model.save_checkpoint(tmp_path / "bare" / "model")  # a run whose other files were not copied
    model.save_checkpoint(tmp_path / "run" / "model")
    model.save_checkpoint(tmp_path / "parent" / "model")
    write(tmp_path / "run" / "config.json", {"tokenizer": "bytes", "steps": 3})
    (tmp_path / "run" / "metrics.jsonl").touch()
    theirs = their_folder(tmp_path / "theirs", "model.layers.0.self_attn.sinks", {"model_type": ""})
    original = their_folder(tmp_path / "original", "block.0.attn.sinks", ORIGINAL)
    run, bare, plain = tmp_path / "run", tmp_path / "bare", tmp_path / "checkpoint"
    for folder, expected in [
        (plain, ("ours", plain, None, None)),
        (run, ("ours", run / "model", run, "bytes")),
        (run / "model", ("ours", run / "model", run, "bytes")),
        (bare, ("ours", bare / "model", bare, None)),
        (theirs, ("hugging_face", theirs, None, None)),
        (original, ("openai", original, None, None)),
        (str(theirs), ("hugging_face", theirs, None, None)),
    ]:
        assert find_model(folder) == expected


def test_find_model_says_what_is_wrong(tmp_path):
    noise_(GPTOSS(tiny_config(num_hidden_layers=1))).save_checkpoint(tmp_path / "no index")
    (tmp_path / "no index" / INDEX_FILE).unlink()
    (tmp_path / "unfinished").mkdir()
    write(tmp_path / "unfinished" / "config.json", {"tokenizer": "bytes"})
    (tmp_path / "started").mkdir()
    (tmp_path / "started" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "no weights").mkdir()
    write(tmp_path / "no weights" / "config.json", ORIGINAL)
    their_folder(tmp_path / "other", "transformer.wte", {})
    (tmp_path / "file").touch()
    for name, message in {
        "absent": "absent: no such folder. convert_hf.py makes",
        "file": "file: no such folder",
        "unfinished": "this run has no model/ yet. train.py with --resume=true",
        "started": "this run has no model/ yet",
        "empty": "empty/config.json does not exist; convert_hf.py makes",
        "no weights": "no tensors in safetensors files here",
        "no index": f"{INDEX_FILE} does not exist.*convert_hf.py",
        "other": "neither our names nor .* but 'transformer.wte'; convert_hf.py",
    }.items():
        with pytest.raises(ValueError, match=message):
            find_model(tmp_path / name)


# --------------------------------------------------------------------------------------------------
# Companions


def test_companions_that_are_links(tmp_path, capsys):
    """A link out of the folder could point to anybody's file; the Hub's cache consists of them."""
    secret, source, out = tmp_path / "secret", tmp_path / "source", tmp_path / "out"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    for folder in (source, out, snapshot, blobs):
        folder.mkdir(parents=True)
    secret.write_text("secret")
    (blobs / "f00d").write_text("from the Hub")
    (source / "tokenizer.json").write_text("mine")
    (source / "tokenizer_link.json").symlink_to(source / "tokenizer.json")
    (source / "tokenizer_config.json").symlink_to(secret)
    (source / "tokenizer.old").mkdir()
    (source / "unrelated.json").touch()
    weights.copy_companions(source, out)
    assert sorted(os.listdir(out)) == ["tokenizer.json", "tokenizer_link.json"]
    assert not (out / "tokenizer_link.json").is_symlink()
    assert (
        f"tokenizer_config.json is not copied: it is a link to {secret}" in capsys.readouterr().out
    )
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/f00d")
    (snapshot / "tokenizer.model").symlink_to(secret)
    weights.copy_companions(snapshot, out)
    assert (out / "chat_template.jinja").read_text() == "from the Hub"
    assert not (out / "tokenizer.model").exists()
