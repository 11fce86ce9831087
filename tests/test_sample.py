"""Generation: what the cache keeps changes nothing, tokens are drawn as they should be, and the terminal shows what was said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import noise_, tiny_config, twins

import chat
from model import GPTOSS
from sample import KeyValueCache, chat_prompt, draw, generate, locate, readable, text_of, write
from tokenizer import ByteTokenizer, get_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def need_vocabulary():
    if not os.path.isfile(
        os.path.join(
            os.environ.get("TIKTOKEN_CACHE_DIR", ""), "fb374d419588a4632f3f557e76b4b70aebbca790"
        )
    ):
        pytest.skip("the o200k vocabulary is not here: set TIKTOKEN_CACHE_DIR to a folder with it")


def prompt_of(config, n, B=1, seed=0):
    return torch.randint(config.vocab_size, (B, n), generator=torch.Generator().manual_seed(seed))


def greedy_without_cache(model, tokens, n):
    """All of it again for every token, in one piece."""
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-n:]


# The cache


@pytest.mark.parametrize("prompt_tokens", [1, 3, 7, 8, 64])
@pytest.mark.parametrize("window", [1, 7, 50])
@torch.no_grad()
def test_greedy_tokens_equal_those_without_a_cache(window, prompt_tokens):
    model = noise_(GPTOSS(tiny_config(sliding_window=window)))
    tokens = prompt_of(model.config, 23)[0].tolist()  # three windows and a bit
    expected = greedy_without_cache(model, tokens, 12)
    assert len(set(expected)) > 2  # not a model that says one thing
    assert list(generate(model, tokens, 12, temperature=0, prompt_tokens=prompt_tokens)) == expected


@pytest.mark.parametrize("chunks", [[29], [1] * 29, [5, 1, 7, 13, 1, 2], [20, 9]])
@torch.no_grad()
def test_features_with_a_cache_equal_those_without(chunks):
    model = noise_(GPTOSS(tiny_config()))
    tokens = prompt_of(model.config, 29, B=2)
    cache = KeyValueCache(model.config, 29)
    parts = [model.features(part, cache=cache) for part in tokens.split(chunks, dim=1)]
    assert cache.length == 29
    torch.testing.assert_close(torch.cat(parts, dim=1), model.features(tokens), rtol=0, atol=2e-5)


def test_generation_keeps_no_graph(monkeypatch):
    """Or the cache would hold every layer's activations of every token."""
    model, drawn = noise_(GPTOSS(tiny_config())), []
    features = model.features
    monkeypatch.setattr(
        model,
        "features",
        lambda *args, **kwargs: drawn.append(features(*args, **kwargs)) or drawn[-1],
    )
    assert len(list(generate(model, [1, 2, 3], 4))) == len(drawn) == 4
    assert not any(x.requires_grad for x in drawn)


def test_a_cache_takes_no_documents():
    model = noise_(GPTOSS(tiny_config()))
    tokens = prompt_of(model.config, 9)
    with pytest.raises(ValueError, match="takes no documents"):
        model.features(tokens, torch.zeros_like(tokens), cache=KeyValueCache(model.config, 9))


def test_greedy_tokens_equal_those_of_transformers():
    ours, theirs = twins(tiny_config())
    tokens = prompt_of(ours.config, 23)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[
        0, 23:
    ].tolist()
    assert list(generate(ours, tokens[0].tolist(), 20, temperature=0, prompt_tokens=5)) == expected


@torch.no_grad()
def test_a_windowed_layer_keeps_what_the_next_token_sees():
    config = tiny_config()
    model, cache = noise_(GPTOSS(config)), KeyValueCache(config, 40)
    for chunk in (20, 1, 1, 15):
        model.features(prompt_of(config, chunk), cache=cache)
        for layer, kept in cache.layers.items():
            for x in kept:
                assert x.shape[1] == (
                    40 if config.window(layer) is None else config.sliding_window - 1
                )
                assert x.untyped_storage().nbytes() == x.numel() * 4  # and nothing behind it
    assert cache.length == 37


# Drawing


def frequencies(probabilities, n=20_000, **options):
    logits = torch.tensor(probabilities).log().expand(n, -1)
    drawn = draw(logits, generator=torch.Generator().manual_seed(0), **options)
    return drawn.bincount(minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.2, 0.5, 0.0, 0.3]),
        (0.5, 1.0, [4 / 38, 25 / 38, 0.0, 9 / 38]),  # squares
        (1.0, 0.8, [0.0, 5 / 8, 0.0, 3 / 8]),
        (1.0, 0.79, [0.0, 5 / 8, 0.0, 3 / 8]),  # the token that crosses the line is in
        (1.0, 0.81, [0.2, 0.5, 0.0, 0.3]),
        (0.5, 0.6, [0.0, 1.0, 0.0, 0.0]),  # of the distribution that the temperature made
        (1.0, 1e-9, [0.0, 1.0, 0.0, 0.0]),
        (0, 1.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_temperature_and_top_p(temperature, top_p, expected):
    probabilities = [0.2 - 1e-4, 0.5 + 1e-4, 0.0, 0.3]  # so that no sum is exactly top_p
    found = frequencies(probabilities, temperature=temperature, top_p=top_p)
    assert torch.allclose(found, torch.tensor(expected), atol=0.012)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


def test_rows_are_drawn_each_from_its_own():
    logits = torch.tensor([[0.0, 9.0, 9.0, 0.0], [9.0, 0.0, 0.0, 9.0]]).repeat(500, 1)
    drawn = draw(logits, 1.0, 0.9, torch.Generator().manual_seed(0)).view(500, 2)
    assert set(drawn[:, 0].tolist()) == {1, 2} and set(drawn[:, 1].tolist()) == {0, 3}


def test_seed_stop_and_length():
    model = noise_(GPTOSS(tiny_config()))

    def run(seed, max_tokens=40, **options):
        return list(
            generate(
                model,
                [1, 2, 3],
                max_tokens,
                generator=torch.Generator().manual_seed(seed),
                **options,
            )
        )

    whole = run(0)
    assert len(whole) == 40 and run(0) == whole != run(1)
    assert (
        run(0, stop=(whole[9], whole[30])) == whole[: whole.index(whole[9])]
    )  # without the stop token
    assert run(0, max_tokens=5) == whole[:5]
    room = model.config.max_position_embeddings - 250
    assert len(list(generate(model, [1] * 250, 1000))) == room == 6  # the context ends first


@pytest.mark.parametrize(
    "n, options, message",
    [
        (0, {}, "prompt of 0 tokens: .* 1 to 255"),
        (256, {}, "prompt of 256 tokens: .* 1 to 255"),
        (3, {"max_tokens": 0}, "max_tokens=0"),
        (3, {"temperature": -1}, "temperature=-1"),
        (3, {"temperature": float("nan")}, "temperature=nan"),
        (3, {"top_p": 0}, "top_p=0"),
        (3, {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_arguments_are_named(n, options, message):
    model = noise_(GPTOSS(tiny_config()))
    with pytest.raises(ValueError, match=message):
        list(generate(model, [1] * n, **{"max_tokens": 5, **options}))


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
    greedy = list(generate(model, tokenizer.encode("naïve"), 9, temperature=0, stop=(256,)))
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
