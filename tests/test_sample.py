"""The command: what it prints, and what it says to mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import tiny_config

import chat
from generate import generate
from model import GPTOSS
from sample import chat_prompt, locate, readable, text_of, write
from tokenizer import ByteTokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def need_vocabulary():
    if not os.path.isfile(
        os.path.join(
            os.environ.get("TIKTOKEN_CACHE_DIR", ""), "fb374d419588a4632f3f557e76b4b70aebbca790"
        )
    ):
        pytest.skip("the o200k vocabulary is not here: set TIKTOKEN_CACHE_DIR to a folder with it")


# Text


def test_characters_come_whole():
    tokenizer = get_tokenizer("bytes")
    pieces = list(text_of(tokenizer.encode("aé日😀b"), tokenizer))
    assert [piece for piece in pieces if piece] == ["a", "é", "日", "😀", "b"]
    assert "".join(text_of([0x61, 0xE6, 0x97], tokenizer)) == "a\ufffd"  # cut off in a character
    assert "".join(text_of([0xFF, 0x62, 256], tokenizer)) == "\ufffdb<|endoftext|>"


ANSWER = (
    "<|channel|>analysis<|message|>Is 1 < 2 or a <| b?<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Yes <|x|>.<|return|>"
)
SHOWN = "[analysis] Is 1 < 2 or a <| b?\n[commentary to=functions.f] {}\n[final] Yes <|x|>.\n"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_channels_are_readable_however_the_pieces_fall(size):
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    assert "".join(readable(pieces)) == SHOWN


def test_what_is_readable_is_not_held_back():
    """Not even after what looks like markup and is none."""
    said = "<|channel|>final<|message|>" + "a <| b " + "so on " * 40
    shown = "".join(
        piece for piece, _ in zip(readable(iter(said)), said)
    )  # without what comes at the end
    assert shown == ("[final] a <| b " + "so on " * 40)
    quick = readable(iter("<|channel|>final<|message|>Hi"))
    assert "".join(next(quick) for _ in range(28)) == "[final] H"  # as soon as it is there
    assert "".join(readable(["cut <|chan"])) == "cut <|chan"


def test_harmony_prompt():
    """OpenAI's package renders it as it would a conversation."""
    need_vocabulary()
    pytest.importorskip(
        "openai_harmony", reason="chat is rendered by openai-harmony, which is not installed"
    )
    tokenizer = get_tokenizer("o200k_harmony")
    prompt = chat_prompt("Hi <|end|>", tokenizer)
    trained = chat.render_chat(
        [{"role": "user", "content": "Hi <|end|>"}, {"role": "assistant", "content": "Ho"}],
        tokenizer,
    )[0]
    assert trained.tolist()[: len(prompt)] == prompt and tokenizer.decode(prompt).endswith(
        "<|end|><|start|>assistant"
    )
    pieces = text_of(tokenizer.encode("日本 😀🏽") + [200_005], tokenizer)
    assert "".join(pieces) == "日本 😀🏽<|channel|>"


# The command


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted folder and a training run, both of bytes."""
    root = tmp_path_factory.mktemp("sample")
    model = GPTOSS(tiny_config(vocab_size=257, max_position_embeddings=128))
    model.init_weights()
    with torch.no_grad():
        model.unembedding.weight *= 50  # so that the likeliest token is clear
    model.save_checkpoint(root / "converted")
    model.save_checkpoint(root / "runs/fake/model")
    (root / "runs/fake/config.json").write_text(json.dumps({"name": "fake", "tokenizer": "bytes"}))
    (root / "runs/young").mkdir()
    (root / "runs/young/config.json").write_text(
        json.dumps({"name": "young", "tokenizer": "bytes"})
    )
    return root


def test_command_on_a_run(folders):
    options = "--max_tokens=9", "--temperature=0", "--device=cpu"
    run = subprocess.run(
        [sys.executable, "sample.py", folders / "runs/fake", "naïve", *options],
        cwd=ROOT,
        capture_output=True,
    )
    assert run.returncode == 0, run.stderr
    tokenizer, model = get_tokenizer("bytes"), GPTOSS.from_checkpoint(folders / "converted")
    (answer,) = generate(model, [tokenizer.encode("naïve")], 9, temperature=0)
    greedy = [token for token in answer.tokens if token != 256]
    assert run.stdout.decode() == "naïve" + tokenizer.decode(greedy) + "\n"
    assert (
        f"prompt of 6 tokens, answer of {len(greedy)}" in run.stderr.decode()
        and b"tok/s" in run.stderr
    )


def test_command_says_what_is_wrong(folders):
    failed = subprocess.run(
        [sys.executable, "sample.py", "absent", "Hi", "--no-chat"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1 and not failed.stdout
    assert (
        failed.stderr.startswith("sample.py: absent: no such folder. convert_hf.py")
        and "Traceback" not in failed.stderr
    )


def test_folders_seeds_and_chats(folders, capsys):
    def printed(folder, prompt="naïve", **options):
        write(folders / folder, prompt, device="cpu", max_tokens=20, **options)
        return capsys.readouterr()

    run = printed("runs/fake", seed=1)
    assert (
        run.out.startswith("naïve")
        and run.out == printed("runs/fake/model", seed=1).out != printed("runs/fake").out
    )
    assert run.out == printed("converted", seed=1, tokenizer="bytes").out
    chat = printed("runs/fake", "Hi", chat=True)
    assert not chat.out.startswith("Hi")
    assert f"prompt of {len(chat_prompt('Hi', get_tokenizer('bytes')))} tokens" in chat.err


def test_an_answer_may_be_empty(folders, capsys, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "stop", tuple(range(257)))
    write(folders / "runs/fake", "Hi", device="cpu")
    printed = capsys.readouterr()
    assert printed.out == "Hi\n" and printed.err == "prompt of 2 tokens, answer of 0\n"


@pytest.mark.parametrize(
    "folder, prompt, options, message",
    [
        ("absent", "Hi", {}, "absent: no such folder. convert_hf.py"),
        (
            "runs/young",
            "Hi",
            {},
            "runs/young: this run has no model/ yet. train.py with --resume=true",
        ),
        (".", "Hi", {"tokenizer": "bytes"}, "config.json: not a readable config.json"),
        ("runs/fake", "Hi " * 50, {}, "prompt of 150 tokens: this model takes 1 to 127"),
        ("runs/fake", "", {}, "prompt of 0 tokens"),
        ("runs/fake", "Hi", {"top_p": 2}, "top_p=2: "),
    ],
)
def test_errors_name_the_fix(folders, capsys, folder, prompt, options, message):
    with pytest.raises(ValueError, match=message):
        write(folders / folder, prompt, **options)
    assert not capsys.readouterr().out


def test_a_tokenizer_larger_than_the_model(folders):
    need_vocabulary()
    with pytest.raises(
        ValueError, match="has 257 tokens, o200k_harmony has 201088: choose --tokenizer=bytes"
    ):
        write(folders / "converted", "Hi", chat=False)


def test_a_folder_that_does_not_say_its_tokenizer(folders, capsys):
    assert locate(folders / "converted") == (folders / "converted", "o200k_harmony")
    assert "o200k_harmony; --tokenizer=... chooses another" in capsys.readouterr().err
    assert (
        locate(folders / "runs/fake")
        == locate(folders / "runs/fake/model")
        == (folders / "runs/fake/model", "bytes")
    )
    assert capsys.readouterr().err == ""
