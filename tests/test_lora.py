"""lora.py and frozen.py: adapters and their gradients against plain autograd through merged
weights; packed experts against the same experts unpacked; what is not computed; folders.

Sizes are multiples of 32, which MXFP4 needs, and no two are equal."""

import json
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

import convert_hf
import fast
import frozen
import lora
from common import (
    assert_all_close,
    batch,
    expert_inputs,
    hugging_face_config,
    noise_,
    relative,
    tiny_config,
)
from convert_hf import HUGGING_FACE, counterparts
from frozen import FrozenExperts, pack
from loop import memory
from lora import adapt
from model import GPTOSS, GPTOSSConfig
from mxfp4 import dequantize_mxfp4
from weights import find_model, save_weights

SIZES = {"hidden_size": 64, "intermediate_size": 32}
CONFIG = tiny_config(**SIZES)
TARGETS = ("qkv", "out", "router", "gate_up", "down")


def random_packed(E, outputs, inputs, seed):
    """Blocks and scales of values around 1 / sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    shape = E, outputs, inputs // 32
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)


def packed_model(config=CONFIG, dtype=torch.float32, recompute="none"):
    """Packed, with noise in every parameter."""
    with torch.device("meta"):
        model = GPTOSS(config, recompute)
    model = pack(model.to(dtype)).to_empty(device="cpu")
    model.load_state_dict(noise_(GPTOSS(config)).state_dict(), strict=False)
    for number, block in enumerate(model.blocks):
        for name in frozen.MATRICES:
            there = [getattr(block.mlp, f"{name}_weight_{part}") for part in ("blocks", "scales")]
            E, outputs, groups = there[1].shape
            for parameter, values in zip(there, random_packed(E, outputs, 32 * groups, number)):
                parameter.data.copy_(values)
    return model


def unpacked_twin(model):
    """The same weights in the plain model, unpacked."""
    state = dict(model.named_parameters())
    for name in [name for name in state if name.endswith("_blocks")]:
        weight = name.removesuffix("_blocks")
        values = dequantize_mxfp4(state.pop(name), state.pop(f"{weight}_scales")).mT
        state[weight] = values.to(model.embedding.weight.dtype)
    twin = GPTOSS(model.config, model.recompute).to(model.embedding.weight.dtype)
    twin.load_state_dict(state)
    return twin


def noisy_adapters(model, seed=7):
    """B not zero, and A and B such that both matter."""
    for number, parameter in enumerate(lora.adapters(model).values()):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter.shape[1] ** 0.5 / 2)
    return model


def step(model, tokens=None):
    """{loss and the gradient of every adapter}"""
    model.zero_grad()
    loss = model(*(tokens or batch(CONFIG, 2, 29)))
    loss.backward()
    frozen = [name for name, p in lora.base(model).items() if p.grad is not None]
    assert not frozen, f"gradients of frozen weights: {frozen}"
    return {"loss": loss.detach(), **{n: p.grad for n, p in lora.adapters(model).items()}}


# --------------------------------------------------------------------------------------------------
# The pair: frozen experts


def frozen_case(N=33, k=3, used=range(7), ranks=(8, 16), packed=False):
    """Inputs of frozen_experts, with ranks of the two adapters; 0: none."""
    chosen, gates, x, w1, b1, w2, b2, _ = expert_inputs(N, k, list(used), torch.float32)
    inputs = [x, chosen, gates]
    if packed:  # other sizes than expert_inputs'
        E, C, two_f = 7, 64, 64
        x = torch.randn(N, C, generator=torch.Generator().manual_seed(1))
        b1, b2 = torch.randn(E, two_f) / 3, torch.randn(E, C) / 3
        inputs = [x, chosen, gates]
        matrices = random_packed(E, two_f, C, 1), random_packed(E, C, two_f // 2, 2)
    else:
        matrices = (w1, None), (w2, None)
    for number, (matrix, bias, rank) in enumerate(zip(matrices, (b1, b2), ranks)):
        E, n, m = len(bias), (x.shape[1], b1.shape[1] // 2)[number], bias.shape[1]
        generator = torch.Generator().manual_seed(number)
        a = torch.randn(E, n, rank, generator=generator) / n**0.5 if rank else None
        b = torch.randn(E, rank, m, generator=generator) / 2 if rank else None
        inputs += [*matrix, a, b, bias]
    return [*inputs, 0.9]


CASES = {
    "both": frozen_case(),
    "gate_up, four experts unused": frozen_case(13, 2, [1, 4, 5], (8, 0)),
    "down, all on one expert": frozen_case(17, 1, [3], (0, 8)),
    "packed": frozen_case(ranks=(0, 0), packed=True),
    "packed, both": frozen_case(29, packed=True),
    "one token": frozen_case(1, 7, packed=True),
}
TRAINED = {"x": 0, "gates": 2, "a1": 5, "b1": 6, "a2": 10, "b2": 11}  # places of inputs


def outcome(function, inputs, dtype, recomputed=False):
    leaves = [
        x.to(dtype, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x
        for x in inputs
    ]
    if dtype == torch.bfloat16:
        leaves[TRAINED["gates"]] = inputs[TRAINED["gates"]].clone()  # fp32 in any model
    trained = {name: leaves[place] for name, place in TRAINED.items() if leaves[place] is not None}
    for leaf in trained.values():
        leaf.requires_grad_()
    if recomputed:
        out = fast.recomputed(function, *leaves, keep_attention=False)
    else:
        out = function(*leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    out.backward(grad.to(out.device, dtype))
    return {"out": out.detach()} | {name: leaf.grad for name, leaf in trained.items()}


@pytest.mark.parametrize("tile", [1 << 15, 9], ids=["whole", "tiled"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_experts_compute_what_their_definition_says(case, recomputed, tile, monkeypatch):
    monkeypatch.setattr(fast, "EXPERT_TOKENS", tile)
    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = outcome(definition, CASES[case], torch.float64)
    assert_all_close(outcome(twin, CASES[case], torch.float32, recomputed), truth, 1e-5)


def test_a_second_derivative_is_the_definitions():
    def second(function, dtype):
        leaves = [x.to(dtype, copy=True) if torch.is_tensor(x) and x.is_floating_point() else x
                  for x in CASES["packed, both"]]  # fmt: skip
        wanted = [leaves[place].requires_grad_() for place in TRAINED.values()]
        out = function(*leaves)
        grads = torch.autograd.grad(out, wanted, torch.ones_like(out), create_graph=True)
        return dict(enumerate(torch.autograd.grad(sum(g.square().sum() for g in grads), wanted)))

    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = second(definition, torch.float64)
    assert_all_close(second(twin, torch.float32), truth, 1e-4)


def test_no_product_of_frozen_experts_is_larger_than_the_rank(monkeypatch):
    """Of matmuls whose result is a matrix per expert, one size is the rank."""
    shapes, grouped_mm = [], F.grouped_mm

    def watched(*args, **kwargs):
        out = grouped_mm(*args, **kwargs)
        if out.dim() == 3:
            shapes.append(min(out.shape[1:]))
        return out

    monkeypatch.setattr(F, "grouped_mm", watched)
    outcome(fast.PAIRS["frozen_experts"][1], CASES["both"], torch.float32)
    assert sorted(shapes) == [8, 8, 16, 16]
    shapes.clear()
    outcome(fast.PAIRS["frozen_experts"][1], CASES["packed"], torch.float32)
    assert shapes == []


def test_autograd_keeps_packed_experts_packed():
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, "experts"))
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x)
    with hooks:
        loss = model(*batch(CONFIG, 2, 29))
    loss.backward()
    E, whole = CONFIG.num_experts, CONFIG.hidden_size * CONFIG.intermediate_size
    whole = [x.shape for x in saved if x.is_floating_point() and x.dim() == 3
             and len(x) == E and x[0].numel() >= whole]  # fmt: skip
    assert not whole
    assert [x for x in saved if x.dtype == torch.uint8]


@pytest.mark.parametrize("tiles, most", [(1, 1), (3, 2)])
def test_whole_matrices_in_memory(tiles, most, monkeypatch):
    """With one tile one at a time; with several both, and none is unpacked twice in a pass."""
    alive, unpacked = set(), []
    bordered = frozen.bordered

    def watched(*args, **kwargs):
        whole = bordered(*args, **kwargs)
        key = len(unpacked)
        unpacked.append(key)
        alive.add(key)
        weakref.finalize(whole, alive.discard, key)
        counts.append(len(alive))
        return whole

    counts = []
    monkeypatch.setattr(frozen, "bordered", watched)
    monkeypatch.setattr(fast, "EXPERT_TOKENS", -(-33 // tiles))
    outcome(fast.PAIRS["frozen_experts"][1], frozen_case(packed=True), torch.float32)
    assert max(counts) == most and len(unpacked) == 4 and not alive


# --------------------------------------------------------------------------------------------------
# Adapters in the model


def merged_gradients(model, tokens):
    """The same as `step`, by autograd in fp64 through the plain model with W + scale A B."""
    plain = GPTOSS(model.config).double()
    state = {name: p.detach().double() for name, p in lora.base(model).items()}
    factors = {
        name: p.detach().double().requires_grad_() for name, p in lora.adapters(model).items()
    }
    for name in [name.removesuffix("lora_a") for name in factors if name.endswith("lora_a")]:
        a, b = factors[f"{name}lora_a"], factors[f"{name}lora_b"]
        state[f"{name}weight"] = state[f"{name}weight"] + 2 * (b @ a if a.dim() == 2 else a @ b)
    with fast.plain():
        loss = functional_call(plain, state, tokens)
    loss.backward()
    return {"loss": loss.detach()} | {name: factor.grad for name, factor in factors.items()}


@pytest.mark.parametrize("recompute", ["none", "attention", "all"])
@pytest.mark.parametrize("targets", [*TARGETS, "all"])
def test_gradients_are_those_through_merged_weights(targets, recompute):
    model = adapt(noise_(GPTOSS(CONFIG, recompute)), 3, 6.0, targets)
    tokens = batch(CONFIG, 2, 29)
    model = noisy_adapters(model)
    assert_all_close(step(model, tokens), merged_gradients(model, tokens), 1e-5)


def test_the_definition_of_adapters():
    """Without any fast twin, in fp64."""
    model, tokens = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, "all").double(), batch(CONFIG, 2, 29)
    noisy_adapters(model)
    with fast.plain():
        actual = step(model, tokens)
    assert_all_close(actual, merged_gradients(model, tokens), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
def test_new_adapters_change_no_bit(packed, dtype):
    tokens, _ = batch(CONFIG, 2, 29)
    model = packed_model(dtype=dtype) if packed else noise_(GPTOSS(CONFIG)).to(dtype)
    for block in model.blocks:  # so that the same kernels run before and after
        block.mlp.__class__ = FrozenExperts
    before = model(tokens)
    adapt(model, 5, 10.0, "attention,router")
    assert torch.equal(model(tokens), before)
    adapt(model, 5, 10.0, "all")
    if dtype == torch.float32:
        assert torch.equal(model(tokens), before)
    noisy_adapters(model)
    assert relative(model(tokens), before) > 1e-2


def test_packed_experts_are_bitwise_the_unpacked_ones():
    """In bf16: logits and the gradients of attention's adapters. The plain model's matrices lie in
    memory as unpacked ones do, because kernels may round another order otherwise."""
    tokens = batch(CONFIG, 2, 29)
    model = adapt(packed_model(dtype=torch.bfloat16), 8, 16.0, "attention")
    twin = adapt(unpacked_twin(model_without_adapters(model)), 8, 16.0, "attention")
    for block in twin.blocks:
        for name in frozen.MATRICES:
            weight = getattr(block.mlp, f"{name}_weight")
            weight.data = weight.data.mT.contiguous().mT
    for m in model, twin:
        noisy_adapters(m)
    assert type(twin.blocks[0].mlp) is not FrozenExperts
    actual, expected = step(model, tokens), step(twin, tokens)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(model(tokens[0]), twin(tokens[0]))


def model_without_adapters(model):
    plain = packed_model(model.config, model.embedding.weight.dtype)
    plain.load_state_dict(lora.base(model))
    return plain


@pytest.mark.parametrize("targets", ["attention", "all"])
def test_packed_experts_in_fp32_are_the_definitions(targets):
    tokens = batch(CONFIG, 2, 29)
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, targets))
    twin = adapt(unpacked_twin(model_without_adapters(model)), 3, 6.0, targets)
    noisy_adapters(twin)
    assert_all_close(step(model, tokens), merged_gradients(twin, tokens), 1e-5)


def test_few_tokens_unpack_few_experts(monkeypatch):
    """As in generation: the same logits from the experts that the tokens chose."""
    model = noisy_adapters(adapt(packed_model(), 3, 6.0, "all"))
    token, sizes = torch.tensor([[5]]), []
    expected = model(token).detach()
    bordered = frozen.bordered
    monkeypatch.setattr(
        frozen, "bordered", lambda w, *a, **k: sizes.append(len(w)) or bordered(w, *a, **k)
    )
    with torch.no_grad():
        assert relative(model(token), expected) < 1e-6
    assert set(sizes) == {CONFIG.experts_per_token}


def test_an_embedding_on_the_host_is_the_same():
    model = noisy_adapters(adapt(noise_(GPTOSS(CONFIG)), 3, 6.0))
    expected = step(model)
    lora.embed_on_host(model)
    assert_all_close(step(model), expected, 0)


@pytest.mark.parametrize("changes, message", [
    ({"rank": 0}, "lora_rank=0: qkv is a matrix 64 x 96, so its adapters can have ranks 1 to 64"),
    ({"rank": 33, "targets": "experts"}, "lora_rank=33: down is a matrix 32 x 64"),
    ({"rank": 6, "targets": "router"}, "router is a matrix 64 x 5"),
    ({"targets": "attention,mlp"}, "lora_targets='attention,mlp': 'mlp' is none of qkv, out"),
    ({"targets": ""}, "lora_targets='': '' is none of"),
    ({"layers": "0-3"}, "lora_layers='0-3': the model has layers 0 to 2"),
    ({"layers": "99999999999999"}, "the model has layers 0 to 2"),
    ({"layers": "2-1"}, "the model has layers 0 to 2"),
    ({"layers": "first"}, "write numbers and ranges, as in 0-3,12"),
])  # fmt: skip
def test_what_does_not_exist(changes, message):
    with pytest.raises(ValueError, match=message):
        adapt(GPTOSS(CONFIG), **changes)


def test_mxfp4_needs_groups():
    with torch.device("meta"), pytest.raises(ValueError, match="gate_up has 20 inputs"):
        pack(GPTOSS(tiny_config()))


def test_only_the_layers_named_are_adapted():
    model = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, "attention,experts", layers="1-2")
    names = {name.split(".lora_")[0].split("_lora_")[0] for name in lora.adapters(model)}
    assert names == {f"blocks.{n}.{m}" for n in (1, 2) for m in
                     ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")}  # fmt: skip
    assert len(step(noisy_adapters(model))) == 1 + 16


# --------------------------------------------------------------------------------------------------
# Folders


def write_base(folder, packed=False, seed=0):
    """A checkpoint folder, in bf16."""
    model = (
        packed_model(dtype=torch.bfloat16) if packed else noise_(GPTOSS(CONFIG), seed).bfloat16()
    )
    save_weights(model, folder, None, CONFIG.to_json)
    return folder


def write_adapters(folder, base, targets="all", layers=""):
    """Adapters on the checkpoint folder `base`. Returns the model that has them."""
    model = lora.from_checkpoint(base, dtype=torch.float32)
    settings = {"rank": 3, "alpha": 6.0, "targets": targets, "layers": layers}
    model = noisy_adapters(adapt(model, **settings))
    settings |= {"base": str(base), "identity": lora.identity(base)}
    lora.save_adapters(model, folder, settings, CONFIG.to_json)
    return model


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
        expected = p.detach()
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


def test_new_adapters_do_not_depend_on_what_else_is_there():
    first = adapt(GPTOSS(CONFIG), 3, 6.0, seed=1)
    again = adapt(noise_(GPTOSS(CONFIG)), 3, 6.0, seed=1)
    other = adapt(GPTOSS(CONFIG), 3, 6.0, seed=2)
    names = [name for name in lora.adapters(first) if name.endswith("lora_a")]
    assert all(torch.equal(first.get_parameter(n), again.get_parameter(n)) for n in names)
    assert not any(torch.equal(first.get_parameter(n), other.get_parameter(n)) for n in names)
    a = first.get_parameter(names[0])
    assert abs(a.std() * a.shape[1] ** 0.5 - 1) < 0.2


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
    "targets, layers", [("attention", ""), ("all", ""), ("down,router", "1"), ("all", "0,2")]
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


def test_what_is_no_adapter_is_not_exported_as_one(tmp_path, capsys):
    base = write_base(tmp_path / "base")
    with pytest.raises(SystemExit, match="holds no adapters: export it without --adapter"):
        convert_hf.main(["--export", str(base), "--out", str(tmp_path / "out"), "--adapter"])
    with pytest.raises(SystemExit):
        convert_hf.main(["--export", str(base), "--out", "out", "--adapter", "--mxfp4"])
    assert "--adapter writes no weights" in capsys.readouterr().err
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


# --------------------------------------------------------------------------------------------------
# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tile", [1 << 15, 9], ids=["whole", "tiled"])
@pytest.mark.parametrize("case", CASES)
def test_frozen_experts_on_a_gpu(case, tile, dtype, monkeypatch):
    """Compiled. In fp32 exact to 1e-5; in bf16 the error is at most twice the definition's, because
    the product with A, or B^T, is rounded too. Nothing is clamped: a value at the limit may be
    rounded to either side."""
    monkeypatch.setattr(fast, "EXPERT_TOKENS", tile)
    inputs = [x.cuda() if torch.is_tensor(x) else x for x in CASES[case][:-1]] + [100.0]
    inputs = [x.to(dtype).float() if torch.is_tensor(x) and x.is_floating_point() else x
              for x in inputs]  # fmt: skip
    definition, twin = fast.PAIRS["frozen_experts"]
    with fast.plain():
        truth = outcome(definition, inputs, torch.float64)
        plain = outcome(definition, inputs, dtype)
    actual = outcome(twin, inputs, dtype)
    for what in truth:
        ours, theirs = relative(actual[what], truth[what]), relative(plain[what], truth[what])
        assert ours <= max(2 * theirs, 1e-5), f"{what}: {ours:.1e}, the definition {theirs:.1e}"


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [0, 2**30])
def test_offload_on_a_gpu(ahead, monkeypatch):
    """Block inputs and the embedding in host memory: the same gradients, bitwise."""
    monkeypatch.setattr(memory, "AHEAD", ahead)
    model = adapt(noise_(GPTOSS(CONFIG, "all").cuda()).bfloat16(), 8, 16.0, "attention")
    tokens, expected = [x.cuda() for x in batch(CONFIG, 2, 64)], None
    noisy_adapters(model)
    for place in nullcontext, memory.HostMemory:
        with place():
            loss = model(*tokens)
        loss.backward()
        found = {name: p.grad.clone() for name, p in lora.adapters(model).items()}
        assert expected is None or all(torch.equal(found[n], expected[n]) for n in found)
        expected = found
        model.zero_grad()
        lora.embed_on_host(model)
        assert not model.embedding.weight.is_cuda


@pytest.mark.gpu
def test_unpacking_on_a_gpu_is_bitwise_that_on_a_cpu():
    blocks, scales = random_packed(4, 5760, 2880, 0)
    scales.flatten()[:256] = torch.arange(256)
    expected = dequantize_mxfp4(blocks, scales).mT
    whole = frozen.bordered(blocks.cuda(), scales.cuda(), None, None, torch.empty(0, device="cuda",
                            dtype=torch.bfloat16))  # fmt: skip
    same = (whole.cpu() == expected) | (whole.cpu().isnan() & expected.isnan())
    assert whole.shape == expected.shape and same.all()


@pytest.mark.gpu
def test_packed_and_unpacked_at_the_20bs_sizes():
    """Logits and gradients of attention's adapters bitwise, where the unpacked experts lie in
    memory as packed ones are unpacked; new adapters on everything change no bit."""
    config = GPTOSSConfig(num_hidden_layers=2, vocab_size=8192)
    with torch.device("meta"):
        model, plain = pack(GPTOSS(config).bfloat16()), GPTOSS(config).bfloat16()
    model, plain = model.to_empty(device="cuda"), plain.to_empty(device="cuda")
    noise_(plain)
    model.load_state_dict(plain.state_dict(), strict=False)
    for number, (block, twin) in enumerate(zip(model.blocks, plain.blocks)):
        for name, (E, n, m) in ("gate_up", (32, 2880, 5760)), ("down", (32, 2880, 2880)):
            packed = random_packed(E, m, n, number)
            for part, values in zip(("blocks", "scales"), packed):
                getattr(block.mlp, f"{name}_weight_{part}").data.copy_(values)
            whole = dequantize_mxfp4(*(x.cuda() for x in packed)).mT
            getattr(twin.mlp, f"{name}_weight").data = whole
    tokens = [x.cuda() for x in batch(config, 1, 4096)]
    with torch.no_grad():
        before = model(tokens[0])
        assert torch.equal(before, plain(tokens[0]))
    for m in model, plain:
        adapt(m, 16, 32.0, "attention")
    with torch.no_grad():
        assert torch.equal(model(tokens[0]), before)
    for m in model, plain:
        noisy_adapters(m)
    actual, expected = step(model, tokens), step(plain, tokens)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    adapt(model, 16, 32.0, "all")  # all start anew, with B zero
    with torch.no_grad():
        assert torch.equal(model(tokens[0]), before)
