"""The command: which model it takes, what it prints, chats, and what it says to mistakes."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

import chat
import generate as generation
import sample
from common import noise_, tiny_config
from conftest import ROOT
from corpora import need_vocabulary
from generate import generate
from lora import adapt, save_adapters
from lora import identity as base_identity
from model import GPTOSS
from runs import command
from sample import chat_prompt, drawable, locate, write
from snapshots import find_state, load_state
from text.tokenizer import ByteTokenizer, get_tokenizer

CPU = torch.device("cpu")
BYTES = get_tokenizer("bytes")
SIZES = {"vocab_size": 300, "max_position_embeddings": 128}


def save_state(model, run, step, **numbers):
    """A state as train.py leaves it."""
    folder = run / f"states/step-{step:08d}"
    folder.mkdir(parents=True)
    tensors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    tensors |= {f"exp_avg.{name}": torch.ones_like(p) for name, p in tensors.items()}
    writer = dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    identity = vars(model.config) | {"data": "data/x", "tokens in data": 9}
    numbers = {"step": step, "updates": step, "identity": identity, "files": {}} | numbers
    (folder / "state.json").write_text(json.dumps(numbers))


def clear(model):
    """So that the likeliest token is clear."""
    with torch.no_grad():
        model.unembedding.weight *= 50
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted folder and training runs: finished, young, with states, with adapters. All of
    bytes, with a vocabulary larger than the tokenizer's."""
    root = tmp_path_factory.mktemp("sample")
    model = clear(GPTOSS(tiny_config(**SIZES)))
    model.save_checkpoint(root / "converted")
    model.save_checkpoint(root / "runs/fake/model")
    for name in "fake", "young", "adapted":
        (root / f"runs/{name}").mkdir(parents=True, exist_ok=True)
        config = json.dumps({"name": name, "tokenizer": "bytes"})
        (root / f"runs/{name}/config.json").write_text(config)
    for step in 10, 20, 30:
        model_then = clear(noise_(GPTOSS(tiny_config(**SIZES)), step))
        loss = 1.0 if step == 20 else 2.0
        save_state(model_then, root / "runs/young", step, held_out=loss, best=loss)
    settings = {"rank": 2, "alpha": 4.0, "targets": "attention", "layers": ""}
    adapt(model, **settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
        if "lora" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    base = {"base": str(root / "converted"), "identity": base_identity(root / "converted")}
    save_adapters(model, root / "runs/adapted/model", settings | base, model.config.to_json)
    save_state(model, root / "runs/adapted", 7)
    model = clear(GPTOSS(tiny_config(**SIZES | {"max_position_embeddings": 5000})))
    model.save_checkpoint(root / "long")
    return root


def greedy(model, prompt, n, tokenizer=BYTES):
    """The text that a model says."""
    texts = drawable(model.config.vocab_size, tokenizer)
    (answer,) = generate(model, [prompt], n, temperature=0, drawable=texts, stop=tokenizer.stop)
    return tokenizer.decode([token for token in answer.tokens if token not in tokenizer.stop])


# --------------------------------------------------------------------------------------------------
# Which model


def test_command_on_a_run(folders):
    fake = folders / "runs/fake"
    run = command("sample", fake, "naïve", "--max_tokens=9", "--temperature=0", "--device=cpu")
    assert run.returncode == 0, run.stderr
    model = GPTOSS.from_checkpoint(folders / "converted")
    said = greedy(model, BYTES.encode("naïve"), 9)
    assert run.stdout.decode() == f"naïve{said}\n"
    assert b"prompt of 6 tokens, answer of" in run.stderr and b"tok/s" in run.stderr
    options = "--max_tokens=9", "--temperature=0", "--fast=false", "--device=cpu"
    plain = command("sample", fake, *options, "naïve")
    assert plain.stdout == run.stdout and b"switched off" in plain.stderr


def test_folders_and_seeds(folders, capsys):
    def printed(folder, **options):
        write(folders / folder, "naïve", device="cpu", max_tokens=20, **options)
        return capsys.readouterr().out

    run = printed("runs/fake", seed=1)
    assert run.startswith("naïve") and run == printed("runs/fake/model", seed=1)
    assert run != printed("runs/fake") and run == printed("converted", seed=1, tokenizer="bytes")


@pytest.mark.parametrize(
    "folder, state, seed",
    [
        ("runs/young/states/step-00000010", None, 10),
        ("runs/young", "10", 10),
        ("runs/young", "best", 20),
        ("runs/young", "last", 30),
    ],
)
def test_any_state_is_a_model(folders, capsys, folder, state, seed):
    write(folders / folder, "ab", state=state, device="cpu", max_tokens=9, temperature=0)
    model = clear(noise_(GPTOSS(tiny_config(**SIZES)), seed))
    assert capsys.readouterr().out == f"ab{greedy(model, BYTES.encode('ab'), 9)}\n"


def test_adapters(folders, capsys):
    """The finished model, and a state, which holds nothing but the adapters."""
    write(folders / "runs/adapted", "ab", device="cpu", max_tokens=9, temperature=0)
    finished = capsys.readouterr().out
    assert finished != f"ab{greedy(GPTOSS.from_checkpoint(folders / 'converted'), [97, 98], 9)}\n"
    write(folders / "runs/adapted", "ab", state=7, device="cpu", max_tokens=9, temperature=0)
    assert capsys.readouterr().out == finished


def test_states_in_another_dtype(folders):
    state = find_state(folders / "runs/young", "last")
    model = load_state(state, dtype=torch.bfloat16)
    whole = dict(load_state(state).named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16 and whole[name].dtype == torch.float32
        torch.testing.assert_close(parameter, whole[name].bfloat16(), rtol=0, atol=0)


def test_a_state_that_lacks_a_parameter(folders, tmp_path):
    model = GPTOSS(tiny_config(**SIZES))
    model.norm.weight.requires_grad_(False)
    save_state(model, tmp_path, 5)
    with pytest.raises(ValueError, match="step-00000005 lacks norm.weight: it is damaged"):
        load_state(tmp_path / "states/step-00000005")


def test_a_folder_that_does_not_say_its_tokenizer(folders, capsys):
    need_vocabulary()
    with pytest.raises(ValueError, match="has 300 tokens, o200k_harmony has 201088: choose --tok"):
        write(folders / "converted", "Hi", chat=False)
    assert "o200k_harmony; --tokenizer=... chooses another" in capsys.readouterr().err
    assert locate(folders / "converted", CPU).tokenizer is None
    assert locate(folders / "runs/fake", CPU).tokenizer == "bytes"


# --------------------------------------------------------------------------------------------------
# What is said


def test_what_has_no_text_is_never_drawn(folders, monkeypatch):
    model = GPTOSS.from_checkpoint(folders / "converted")
    (answer,) = generate(model, [[1]], 100)
    assert max(answer.tokens) >= BYTES.vocab_size  # without care
    drawn, stream = [], generation.Decoder.stream

    def noted(*arguments):
        for event in stream(*arguments):
            drawn.append(event[1])
            yield event

    monkeypatch.setattr(generation.Decoder, "stream", noted)
    write(folders / "runs/fake", "a", device="cpu", max_tokens=100, temperature=3.0, seed=2)
    assert len(drawn) > 50 and max(drawn) < 257
    monkeypatch.undo()
    texts = drawable(300, BYTES)
    assert texts[:257].all() and not texts[257:].any()
    (answer,) = generate(model, [[1]], 100, drawable=texts)
    assert max(answer.tokens) < 257
    need_vocabulary()
    texts = drawable(201_100, get_tokenizer("o200k_harmony"))
    assert texts[:199_998].all() and texts[[199_999, 200_002, 200_005, 200_012]].all()
    assert not texts[201_088:].any() and not texts[200_013]


def test_an_answer_may_be_empty(folders, capsys, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "stop", tuple(range(257)))
    write(folders / "runs/fake", "Hi", device="cpu")
    printed = capsys.readouterr()
    assert printed.out == "Hi\n"
    assert printed.err.endswith("prompt of 2 tokens, answer of 0\n")


def test_an_ascii_terminal(folders):
    options = "--max_tokens=60", "--temperature=2", "--device=cpu"
    run = command("sample", folders / "runs/fake", "naïve", *options, encoding="ascii")
    assert run.returncode == 0 and run.stdout.startswith(b"na?ve"), run.stderr


def test_a_closed_pipe(folders):
    """In a process of its own, as a user starts it."""
    options = "--max_tokens=60", "--temperature=2", "--device=cpu"
    line = [sys.executable, "sample.py", folders / "runs/fake", "naïve", *options]
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(line, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert closed.returncode == 0 and b"sample.py:" not in closed.stderr


# --------------------------------------------------------------------------------------------------
# Chats


def test_prompt_of_bytes():
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "channel": "analysis", "content": "hm"},
        {"role": "assistant", "channel": "final", "content": "Ho"},
        {"role": "user", "content": "Go"},
    ]
    assert BYTES.decode(chat_prompt(messages, BYTES, "Be brief")) == (
        "<|start|>developer<|message|># Instructions\n\nBe brief<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Ho<|end|>"
        "<|start|>user<|message|>Go<|end|><|start|>assistant"
    )


@pytest.mark.parametrize("reasoning", [None, "low", "high"])
def test_prompts_equal_those_of_openai_harmony(reasoning):
    need_vocabulary()
    package = pytest.importorskip("openai_harmony", reason="renders chats")
    tokenizer, encoding = get_tokenizer("o200k_harmony"), chat.load_harmony()[1]
    messages = [
        {"role": "user", "content": "Hi <|end|>"},
        {"role": "assistant", "channel": "analysis", "content": "hm"},
        {
            "role": "assistant",
            "channel": "commentary",
            "recipient": "functions.f",
            "content_type": "<|constrain|>json",
            "content": "{}",
        },
        {"role": "user", "content": "So?"},
        {"role": "assistant", "channel": "analysis", "content": "hm"},
        {"role": "assistant", "channel": "final", "content": "Ho"},
        {"role": "user", "content": "Go"},
    ]
    system = package.SystemContent.new()
    if reasoning:
        effort = getattr(package.ReasoningEffort, reasoning.upper())
        system = system.with_reasoning_effort(effort)
    developer = package.DeveloperContent.new().with_instructions("Be brief")
    for some in messages[:1], messages:
        conversation = package.Conversation.from_messages(
            [
                package.Message.from_role_and_content(package.Role.SYSTEM, system),
                package.Message.from_role_and_content(package.Role.DEVELOPER, developer),
                *map(package.Message.from_dict, some),
            ]
        )
        role = package.Role.ASSISTANT
        expected = encoding.render_conversation_for_completion(conversation, role)
        assert chat_prompt(some, tokenizer, "Be brief", reasoning) == expected


def says(texts, monkeypatch):
    """Make models say `texts`, one after the other. Returns the prompts they are given."""
    prompts, left = [], iter(texts)

    def stream(decoder, asked, max_tokens, stop, seeds):
        prompts.append((BYTES.decode(asked[0]), max_tokens, seeds))
        for token in BYTES.encode(next(left)):
            if token == ord("^"):
                raise KeyboardInterrupt
            yield 0, token, -0.5

    monkeypatch.setattr(generation.Decoder, "stream", stream)
    return prompts


def test_a_chat(folders, capsys, monkeypatch):
    """Its history, a call, Ctrl-C, a full context, a message that is too long."""
    answers = (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>Ho",
        " to=f.g<|channel|>commentary json<|message|>{}",
        "<|channel|>final<|message|>Once upon^ a time",
        "<|channel|>final<|message|>The end.",
    )
    prompts = says(answers, monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\nCall\nTell\nGo\n" + "long " * 60 + "\n"))
    monkeypatch.setattr(sample, "check_memory", lambda *_: None)
    source = sample.locate(folders / "runs/fake", CPU)
    wide_ = source.config.__class__(**vars(source.config) | {"max_position_embeddings": 260})
    wide_model = GPTOSS(wide_)
    changed = source._replace(config=wide_, load=lambda: wide_model)
    monkeypatch.setattr(sample, "locate", lambda *_: changed)
    write("x", device="cpu", seed=5)
    printed = capsys.readouterr()
    assert printed.out == (
        "[analysis] hm\n[final] Ho\n[commentary to f.g] {}\n[final] Once upon\n[final] The end.\n"
    )
    user, assistant = "<|start|>user<|message|>", "<|start|>assistant"
    first = f"{user}Hi<|end|>{assistant}"
    assert prompts[0] == (first, 260 - len(first), [5])
    second = f"{first}<|channel|>final<|message|>Ho<|end|>{user}Call<|end|>{assistant}"
    assert prompts[1][0] == second  # without the reasoning
    third = f"{user}Call<|end|>{assistant}<|channel|>commentary<|message|>{{}}<|end|>"
    assert prompts[2][0] == f"{third}{user}Tell<|end|>{assistant}"  # without the oldest turn
    told = "<|channel|>final<|message|>Once upon<|end|>"  # as far as it went
    assert prompts[3][0] == f"{user}Tell<|end|>{assistant}{told}{user}Go<|end|>{assistant}"
    assert [seeds for *_, seeds in prompts] == [[5], [6], [7], [8]]
    assert len(prompts) == 4 and "a prompt of 349 tokens: the context holds 260" in printed.err
    assert printed.err.count("the oldest turn is left out") >= 2
    assert "f.g is called; nothing runs here" in printed.err
    assert "stopped, the first after" in printed.err


def test_a_chat_over_a_pipe(folders):
    """Real answers, one process, a line of speed for each."""
    options = "--max_tokens=8", "--temperature=0", "--device=cpu"
    run = command("sample", folders / "runs/fake", *options, input=b"Hi\nHo\n")
    assert run.returncode == 0, run.stderr
    model = GPTOSS.from_checkpoint(folders / "converted")
    prompt = chat_prompt([{"role": "user", "content": "Hi"}], BYTES)
    assert run.stdout.decode().startswith(greedy(model, prompt, 8).lstrip("<"))
    assert run.stderr.count(b"tok/s") == 2


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(folders):
    main, terminal = pty.openpty()
    options = "--tokenizer=bytes", "--device=cpu", "--temperature=0"
    line = [sys.executable, "sample.py", folders / "long", *options]
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, **streams)
    os.close(terminal)
    seen, end = b"", time.monotonic() + 120

    def wait_for(text):
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < end and process.poll() is None, seen
            seen += os.read(main, 4096)
        seen = seen.split(text, 1)[1]

    try:
        wait_for(b"> ")
        os.write(main, b"Hi\n")
        wait_for(b"Hi\r\n")
        while len(seen) < 300:  # in the middle of thousands of tokens; before are lines on kernels
            seen += os.read(main, 4096)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(b", stopped, the first after")
        wait_for(b"> ")  # the next line
        os.write(main, b"\x04")  # the end of the input
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main)


def test_a_chat_with_one_message(folders, capsys):
    write(folders / "runs/fake", "Hi", chat=True, device="cpu", max_tokens=20)
    printed = capsys.readouterr()
    prompt = chat_prompt([{"role": "user", "content": "Hi"}], BYTES)
    assert not printed.out.startswith("Hi") and f"prompt of {len(prompt)} tokens" in printed.err


# --------------------------------------------------------------------------------------------------
# Mistakes


def test_command_says_what_is_wrong():
    failed = command("sample", "absent", "Hi", "--no-chat")
    assert failed.returncode == 1 and not failed.stdout and b"Traceback" not in failed.stderr
    assert failed.stderr.startswith(b"sample.py: absent: no such folder. convert_hf.py")


@pytest.mark.parametrize(
    "folder, prompt, options, message",
    [
        ("absent", "Hi", {}, "absent: no such folder. convert_hf.py"),
        ("runs/young", "Hi", {}, "runs/young: this run has no model/ yet. train.py with --resume"),
        ("runs/young", "Hi", {"state": 11}, "no state 11: states after steps: 10, 20, 30"),
        ("runs/young", "Hi", {"state": "newest"}, "state=newest: best, last, or a number"),
        ("runs/fake", "Hi", {"state": "last"}, "no state last: states after steps: none"),
        ("runs/adapted", "Hi", {"state": "best"}, "no state has a held-out loss"),
        (".", "Hi", {"tokenizer": "bytes"}, "config.json does not exist; convert_hf.py makes"),
        ("runs/fake", "Hi " * 50, {}, "prompt of 150 tokens: this model takes 1 to 127"),
        ("runs/fake", "", {}, "prompt of 0 tokens"),
        ("runs/fake", "Hi", {"top_p": 2}, "top_p=2: "),
        ("runs/fake", "Hi", {"max_tokens": 0}, "max_tokens=0: "),
        ("runs/fake", None, {"max_tokens": 0}, "max_tokens=0: "),
        ("runs/fake", None, {"chat": False}, "--no-chat continues a text: give it a prompt"),
        ("runs/fake", "Hi", {"system": "x"}, "belong to a chat: --chat makes"),
        ("runs/fake", None, {"reasoning": "low"}, "reasoning_effort need o200k_harmony"),
        ("runs/fake", "Hi", {"context": 1000}, "--context=1000: 2 to 128 tokens"),
        ("runs/fake", "Hi there", {"context": 8}, "a prompt of 8 tokens leaves no room in 8"),
    ],
)
def test_errors_name_the_fix(folders, capsys, monkeypatch, folder, prompt, options, message):
    """Before any weights are read."""
    monkeypatch.setattr(sample, "check_memory", None)
    with pytest.raises(ValueError, match=message):
        write(folders / folder, prompt, **{"device": "cpu", **options})
    assert not capsys.readouterr().out


def test_what_does_not_fit_into_memory(folders, monkeypatch):
    monkeypatch.setattr(sample, "free_memory", lambda device: 1000)
    expected = "weights and 0.0 GiB of cache for 22 tokens do not fit into the 0.0 GiB that cpu has"
    with pytest.raises(ValueError, match=expected):
        write(folders / "runs/fake", "Hi", device="cpu", max_tokens=20)
