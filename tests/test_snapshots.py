"""Any saved state is a model: an export of one is what its run had learned then."""

import json
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

import convert_hf
import lora
import snapshots
from convert_hf import import_checkpoint, main
from hf_folders import all_tensors, same_bits, transformers
from lora import is_adapter
from model import GPTOSS
from runs import make_home, states, train
from sample import locate
from snapshots import adapter_settings, find_state, load_state, state_places
from weights import find_model

CPU = torch.device("cpu")
TOLD = ("--steps=6", "--save_every=3", "--lr=1e-2")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two runs of six steps with states after 3 and 6: full, which ended, on two ranks, and
    adapters on it, which was interrupted before it wrote a model."""
    home = make_home(tmp_path_factory.mktemp("home"))
    full = ("--name=full", "--sp=2", "--eval_every=3", "--intermediate_size=32")
    train(home, "tiny.py", *TOLD, *full, ranks=2)
    (home / "runs/full/model/tokenizer.json").write_text('{"model": 1}')
    (home / "runs/full/model/chat_template.jinja").write_text("{{ messages }}")
    config = [line for line in (home / "tiny.py").read_text().splitlines() if "seq_len" in line]
    (home / "adapters.py").write_text("\n".join([*config, 'data = "corpus"']))
    adapted = (
        "--checkpoint=runs/full",
        "--lora_rank=3",
        "--lora_targets=all,unembedding",
        "--name=lora",
    )
    train(home, "adapters.py", *TOLD, *adapted)
    shutil.copytree(home / "runs/lora", home / "runs/ended")
    shutil.rmtree(home / "runs/lora/model")
    return home


@pytest.fixture(autouse=True)
def in_home(home, monkeypatch, tmp_path):
    monkeypatch.chdir(home)
    return tmp_path


def exported(out, *arguments):
    main(["--out", str(out), "--export", *arguments])
    return all_tensors(out)


def test_the_last_state_is_the_model(tmp_path):
    assert states(".", "full") == ["step-00000003", "step-00000006"]
    expected = exported(tmp_path / "run", "runs/full")
    for number, told in enumerate(
        (["runs/full/states/step-00000006"], ["runs/full", "--state=last"])
    ):
        found = exported(tmp_path / str(number), *told)
        assert found.keys() == expected.keys()
        assert all(same_bits(found[name], expected[name]) for name in expected)
        files = sorted(path.name for path in (tmp_path / str(number)).iterdir())
        assert files == sorted(path.name for path in (tmp_path / "run").iterdir())
        assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(files)
        config = (tmp_path / str(number) / "config.json").read_text()
        assert config == (tmp_path / "run/config.json").read_text()


@torch.no_grad()
def test_an_earlier_state(tmp_path, capsys):
    """By its number of steps, and as the best; transformers computes what load_state's model does,
    also in bf16."""
    losses = {step: snapshots.read_json(path / "state.json")["held_out"] for step, path in (
        (step, find_state("runs/full", step)) for step in (3, 6))}  # fmt: skip
    best = min(losses, key=losses.get)
    early, late = (exported(tmp_path / str(step), "runs/full", f"--state={step}")
                   for step in (3, 6))  # fmt: skip
    assert not any(torch.equal(early[n], late[n]) for n in early if n.endswith("norm.weight"))
    chosen = exported(tmp_path / "best", "runs/full", "--state=best")
    assert all(same_bits(chosen[n], (early if best == 3 else late)[n]) for n in chosen)
    tokens = torch.arange(40)[None]
    ours = load_state(find_state("runs/full", 3))(tokens)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "3")
    assert (theirs(tokens).logits - ours).abs().max() <= 1e-5
    half = exported(tmp_path / "half", "runs/full", "--state=3", "--dtype=bfloat16")
    assert all(same_bits(half[name], early[name].bfloat16()) for name in early)
    packed = exported(tmp_path / "packed", "runs/full", "--state=3", "--mxfp4")
    assert any(name.endswith("_blocks") for name in packed)


def test_the_size_of_a_state_is_that_on_its_device():
    """A GPU computes in bf16; a CPU in what is stored, whether or not there is a GPU too."""
    on_cpu, on_gpu = (locate("runs/full", torch.device(name), "last") for name in ("cpu", "cuda"))
    assert (on_cpu.dtype, on_gpu.dtype) == (torch.float32, torch.bfloat16)
    assert on_cpu.size == 2 * on_gpu.size == 4 * sum(p.numel() for p in on_cpu.load().parameters())
    on_cpu, on_gpu = (locate("runs/lora", torch.device(name), "last") for name in ("cpu", "cuda"))
    assert (on_cpu.dtype, on_gpu.dtype) == (torch.float32, torch.bfloat16)
    assert on_cpu.size // 2 == on_gpu.size


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_state_is_read_in_the_dtype_that_is_asked_for(name, monkeypatch):
    """Rounded on its way: a GPU with room for the model in bf16 has none for it in fp32."""
    state = find_state(f"runs/{name}", "last")
    whole = dict(load_state(state).named_parameters())
    monkeypatch.setattr(torch.nn.Module, "to_empty", empty_of(torch.bfloat16))
    half = dict(load_state(state, dtype=torch.bfloat16).named_parameters())
    assert half.keys() == whole.keys()
    assert all(same_bits(half[n].data, whole[n].data.bfloat16()) for n in whole)


def empty_of(dtype, to_empty=torch.nn.Module.to_empty):
    """to_empty of a model all of which has this dtype."""

    def checked(model, **options):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        return to_empty(model, **options)

    return checked


@torch.no_grad()
def test_a_state_of_adapters_before_there_is_a_model(tmp_path):
    state = find_state("runs/lora", "last")
    settings = lora.read_settings(find_model("runs/ended").weights)
    assert adapter_settings(state) == settings
    assert adapter_settings(find_state("runs/full", "last")) is None
    tokens = torch.arange(40)[None]
    expected = lora.from_checkpoint("runs/ended/model")(tokens)
    assert not torch.equal(expected, GPTOSS.from_checkpoint("runs/full/model")(tokens))
    assert torch.equal(load_state(state)(tokens), expected)
    assert torch.equal(load_state(find_state("runs/ended", "last"))(tokens), expected)
    source = locate("runs/lora", CPU, "last")
    assert torch.equal(source.load()(tokens), expected)
    assert source.size == locate("runs/ended", CPU).size and source.tokenizer == "bytes"
    found, merged = exported(tmp_path / "a", str(state)), exported(tmp_path / "b", "runs/ended")
    assert all(same_bits(found[name], merged[name]) for name in merged)
    import_checkpoint(str(tmp_path / "a"), tmp_path / "again")
    ours = GPTOSS.from_checkpoint(tmp_path / "again")(tokens)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_adapters_whose_base_changed(home, tmp_path):
    shutil.copytree("runs/lora", tmp_path / "runs/lora")
    state = find_state(tmp_path / "runs/lora", "last")
    config = json.loads((tmp_path / "runs/lora/config.json").read_text())
    for base, message in (("absent", "the base absent is not there"), ("base", "other weights")):
        config["checkpoint"] = str(tmp_path / base) if base == "base" else base
        (tmp_path / "runs/lora/config.json").write_text(json.dumps(config))
        if base == "base":
            GPTOSS.from_checkpoint("runs/full/model").bfloat16().save_checkpoint(tmp_path / base)
        for use in (load_state, state_places):
            with pytest.raises(ValueError, match=f"lora/config.json: .*{message}"):
                use(state)


def test_a_parameter_is_read_once(monkeypatch):
    """However many slices and threads ask for it; and the files' headers are not read for each."""
    read, counted = snapshots.read_tensors, []
    monkeypatch.setattr(
        snapshots, "read_tensors", lambda f, tensors: (counted.extend(tensors), read(f, tensors))
    )
    headers, looked = dcp.HuggingFaceStorageReader.read_metadata, []
    monkeypatch.setattr(
        dcp.HuggingFaceStorageReader,
        "read_metadata",
        lambda self: (looked.append(self), headers(self))[1],
    )
    monkeypatch.setattr(convert_hf, "SLICE_BYTES", 1)
    places, _ = state_places(find_state("runs/full", 3))
    for name, place in places.items():
        parts = [place[i : i + 1] for i in range(place.shape[0])]
        assert torch.equal(torch.cat(parts), place[:]) and not is_adapter(name)
    assert sorted(counted) == sorted(places)
    assert len(looked) == 2  # once for the names, once to read


@pytest.mark.parametrize(
    "told, message",
    [
        (["runs/full", "--state=4"], "no state 4: states after steps: 3, 6"),
        (["runs/full", "--state=newest"], "state=newest: best, last, or a number of steps"),
        (["runs/lora", "--state=best"], "no state has a held-out loss"),
        (["runs/lora"], "runs/lora: this run has no model/ yet"),
    ],
)
def test_a_state_that_is_not_there(tmp_path, told, message):
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        main(["--out", str(tmp_path / "out"), "--export", *told])
    assert not (tmp_path / "out").exists()


def test_a_state_that_lacks_a_parameter(tmp_path):
    """As one of a damaged disk: the export names it and leaves nothing."""
    state = tmp_path / "states/step-00000003"
    shutil.copytree("runs/full/states/step-00000003", state)
    lost = max(state.glob("*.safetensors"))
    lost.unlink()
    with pytest.raises(SystemExit, match="error: .*step-00000003 does not fit the model, 29 prob"):
        main(["--out", str(tmp_path / "out"), "--export", str(state)])
    assert not (tmp_path / "out").exists()


def test_a_state_of_adapters_that_lacks_one(monkeypatch):
    state = find_state("runs/lora", "last")
    stored = snapshots.stored_tensors(state)
    del stored["blocks.0.attention.qkv.lora_b"]
    monkeypatch.setattr(snapshots, "stored_tensors", lambda folder: stored)
    for use in (load_state, state_places):
        with pytest.raises(ValueError, match=r"lacks blocks\.0\.attention\.qkv\.lora_b: it is"):
            use(state)


def test_a_state_knows_its_run_from_anywhere(monkeypatch):
    monkeypatch.chdir("runs/full/states")
    for state in "step-00000006", "step-00000003/../step-00000006":
        found = snapshots.find_exported(state)
        assert found.tokenizer == "bytes" and (found.homes[0] / "tokenizer.json").exists()
