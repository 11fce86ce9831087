"""weights.py: what a config.json means, ours, OpenAI's and transformers'.

transformers is the reference for its own: what is accepted must mean the same there.
"""

import inspect
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import weights
from common import hugging_face_config, tiny_config
from model import GPTOSSConfig
from weights import hf_config, read_config

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
