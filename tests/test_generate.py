"""Generation: the cache changes nothing, a sequence depends on its seed alone, tokens are drawn as
they should be, and sharded models generate too."""

import contextlib
import functools

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import generate as module
import sp
from common import noise_, run_ranks, tiny_config, twins
from generate import (
    Answer,
    Decoder,
    attend_cache,
    attention_in_parts,
    cache_bytes,
    draw,
    generate,
    ring_positions,
)
from model import GPTOSS, dense_attention

LENGTHS = (23, 1, 2, 7, 8, 40)  # of prompts: three windows and a bit, none to fill the cache, …


def make_prompts(config, lengths=LENGTHS):
    generators = (torch.Generator().manual_seed(n) for n in lengths)
    return [
        torch.randint(config.vocab_size, (n,), generator=g).tolist()
        for n, g in zip(lengths, generators)
    ]


@torch.no_grad()
def greedy_without_cache(model, tokens, n):
    tokens = list(tokens)
    for _ in range(n):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[-n:]


def tokens_of(answers):
    return [answer.tokens for answer in answers]


# --------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("window", [1, 7, 50])
def test_greedy_tokens_equal_those_without_a_cache(window):
    model = noise_(GPTOSS(tiny_config(sliding_window=window)))
    prompts = make_prompts(model.config)
    expected = [greedy_without_cache(model, prompt, 12) for prompt in prompts]
    assert all(len(set(tokens)) > 2 for tokens in expected)  # not a model that says one thing
    for together in (1, 2, 6):
        answers = generate(model, prompts, 12, temperature=0, together=together)
        assert tokens_of(answers) == expected


def test_greedy_tokens_equal_those_of_transformers():
    ours, theirs = twins(tiny_config())
    prompts = make_prompts(ours.config)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        expected.append(theirs.generate(tokens, attention_mask=torch.ones_like(tokens), **options))
    expected = [all_[0, len(prompt) :].tolist() for all_, prompt in zip(expected, prompts)]
    assert tokens_of(generate(ours, prompts, 20, temperature=0)) == expected


@pytest.mark.parametrize("temperature", [0, 0.7, 1.3])
def test_log_probabilities_equal_those_without_a_cache(temperature):
    model = noise_(GPTOSS(tiny_config()))
    prompts = make_prompts(model.config)
    allowed = torch.arange(model.config.vocab_size) % 3 > 0
    options = {"temperature": temperature, "top_p": 0.9, "drawable": allowed}
    for prompt, (tokens, logprobs) in zip(prompts, generate(model, prompts, 30, **options)):
        both = torch.tensor([prompt + tokens])
        expected = model.logprobs(both[:, :-1], both[:, 1:], temperature=temperature or 1)
        difference = torch.tensor(logprobs) - expected[0, len(prompt) - 1 :]
        assert len(tokens) == 30 and difference.abs().max() < 2e-5
        assert all(allowed[tokens])


def test_prompts_pass_the_model_in_groups(monkeypatch):
    model = noise_(GPTOSS(tiny_config()))
    prompts, groups = make_prompts(model.config), []
    expected = tokens_of(generate(model, prompts, 9))
    prefill = Decoder.prefill

    def noted(decoder, places):
        groups.append([len(prompt) for prompt in places])
        prefill(decoder, places)

    monkeypatch.setattr(Decoder, "prefill", noted)
    monkeypatch.setattr(module, "PREFILL_TOKENS", 30)
    assert tokens_of(generate(model, prompts, 9)) == expected
    assert groups == [[1, 6, 7], [22], [39]]  # each prompt without its last token, padded within 30
    groups.clear()
    many = [prompt for prompt in prompts for _ in range(3)]  # equal ones pass it once
    answers = tokens_of(generate(model, many, 9, seeds=[i // 3 for i in range(len(many))]))
    assert answers == [tokens for tokens in expected for _ in range(3)]
    assert groups == [[1, 6, 7], [22], [39]]


@pytest.mark.parametrize("H, K, T", [(6, 3, 9), (4, 1, 1)])
def test_attention_of_one_query_per_sequence(H, K, T):
    generator = torch.Generator().manual_seed(T)
    shapes = (2, H, 4), (2, T, K, 4), (2, T, K, 4), (H,)
    q, k, v, sinks = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    visible = torch.arange(T) <= torch.tensor([[T - 1], [T // 2]])
    out = attend_cache(q, k.transpose(1, 2), v.transpose(1, 2), 3 * sinks, visible)
    for i, seen in enumerate(visible.sum(-1)):
        expected = dense_attention(
            q[i, None, None], k[i, None, :seen], v[i, None, :seen], 3 * sinks
        )
        torch.testing.assert_close(out[i], expected[0, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_attention_in_parts(window, monkeypatch):
    monkeypatch.setattr(module, "QUERIES", 5)
    generator, keys = torch.Generator().manual_seed(0), []
    shapes = (2, 23, 6, 4), (2, 23, 3, 4), (2, 23, 3, 4), (6,)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]

    def noted(q, k, v, sinks, window):
        keys.append(k.shape[1])
        return dense_attention(q, k, v, sinks, window)

    monkeypatch.setattr(module, "dense_attention", noted)
    actual = attention_in_parts(*inputs, window=window)
    torch.testing.assert_close(actual, dense_attention(*inputs, window), rtol=1e-12, atol=1e-12)
    assert keys == [min(end, 5 + (window or 23) - 1, end) for end in (5, 10, 15, 20, 23)] or (
        window in (1, 4) and max(keys) == 5 + window - 1
    )


def test_a_windowed_layer_is_a_ring():
    positions = ring_positions(torch.tensor([0, 2, 3, 9]), 4)
    assert positions.tolist() == [[0, -3, -2, -1], [0, 1, 2, -1], [0, 1, 2, 3], [8, 9, 6, 7]]


def test_memory_of_the_cache():
    config = tiny_config()
    decoder = Decoder(noise_(GPTOSS(config)), 3, 40)
    sizes = [x.untyped_storage().nbytes() for x in (*decoder.keys, *decoder.values)]
    assert sum(sizes) == cache_bytes(config, 3, 40, torch.float32)
    assert {x.shape[2] for x in decoder.keys} == {config.sliding_window, 40}
    assert decoder.keys[1].shape[2] == 40  # odd layers see everything


def test_a_decoder_is_where_the_model_computes():
    """And not where an embedding in host memory lies. The meta device stands in for a GPU."""
    with torch.device("meta"):
        model = GPTOSS(tiny_config())
    model.embedding = GPTOSS(model.config).embedding
    drawable = torch.ones(model.config.vocab_size, dtype=torch.bool)
    decoder = Decoder(model, slots=2, capacity=8, drawable=drawable)
    held = [x for x in vars(decoder).values() if torch.is_tensor(x)]
    assert len(held) == 6 and decoder.keys and decoder.values
    for x in [*held, *decoder.keys, *decoder.values]:
        assert x.device.type == decoder.device.type == "meta"


def test_generation_keeps_no_graph():
    model = noise_(GPTOSS(tiny_config()))
    decoder = Decoder(model, 2, 30)
    for _, token, logprob in decoder.stream(make_prompts(model.config, (5, 9, 3)), 4):
        assert isinstance(token, int) and isinstance(logprob, float)
    state = *decoder.keys, *decoder.values, decoder.token, decoder.logprob
    assert not any(x.requires_grad for x in state)


# --------------------------------------------------------------------------------------------------
# Sequences do not depend on each other


def test_a_sequence_depends_on_its_seed_alone():
    model = noise_(GPTOSS(tiny_config()))
    prompts, seeds = make_prompts(model.config), [5, 3, 3, 0, 2**40, 1]
    alone = [generate(model, [p], 25, seeds=[seed])[0] for p, seed in zip(prompts, seeds)]
    for together in (2, 6):
        answers = generate(model, prompts, 25, seeds=seeds, together=together)
        assert tokens_of(answers) == tokens_of(alone)
        for one, other in zip(answers, alone):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=2e-5)
    same = generate(model, [prompts[0]] * 3, 25, seeds=[1, 2, 1])
    assert same[0].tokens == same[2].tokens != same[1].tokens
    assert tokens_of(generate(model, [prompts[0]] * 2, 25)) == tokens_of(
        generate(model, [prompts[0]] * 2, 25, seeds=[0, 1])
    )


def test_prompts_and_seeds_of_any_kind():
    model = noise_(GPTOSS(tiny_config()))
    prompts = make_prompts(model.config)
    expected = generate(model, prompts, 5, seeds=list(range(len(prompts))))
    assert generate(model, (iter(p) for p in prompts), 5, seeds=range(len(prompts))) == expected
    with pytest.raises(ValueError, match=f"1 seeds for {len(prompts)} prompts"):
        generate(model, prompts, 5, seeds=[0])


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_each_sequence_stops_by_itself(ahead, slots):
    """Also when steps are started before the last token is known to be the last."""
    model = noise_(GPTOSS(tiny_config()))
    prompts = make_prompts(model.config, (3, 12, 5, 1, 9))
    whole = tokens_of(generate(model, prompts, 20))
    stop = whole[0][4], whole[2][0], whole[3][-1]
    ends = [next((i + 1 for i, t in enumerate(tokens) if t in stop), 20) for tokens in whole]
    assert len(set(ends)) >= 3
    decoder, answers = Decoder(model, slots, 40), [[] for _ in prompts]
    decoder.ahead = ahead
    for _ in range(2):  # a decoder serves again
        for number, token, _ in decoder.stream(prompts, 20, stop):
            answers[number].append(token)
        assert answers == [tokens[:end] for tokens, end in zip(whole, ends)]
        answers = [[] for _ in prompts]


def test_an_abandoned_stream_leaves_the_decoder_usable():
    model = noise_(GPTOSS(tiny_config()))
    prompts, decoder = make_prompts(model.config), Decoder(model, 2, 60)
    whole = [(number, token) for number, token, _ in decoder.stream(prompts, 9)]
    for _ in zip(range(7), decoder.stream(prompts[::-1], 9)):
        pass
    assert [(number, token) for number, token, _ in decoder.stream(prompts, 9)] == whole


def test_seed_stop_and_length():
    model = noise_(GPTOSS(tiny_config()))

    def run(seed, max_tokens=40, **options):
        return generate(model, [[1, 2, 3]], max_tokens, seeds=[seed], **options)[0].tokens

    whole = run(0)
    assert len(whole) == 40 and run(0) == whole != run(1)
    assert run(0, stop=(whole[9], whole[30])) == whole[: whole.index(whole[9]) + 1]
    assert run(0, max_tokens=5) == whole[:5]
    room = model.config.max_position_embeddings - 250
    answers = generate(model, [[1] * 250, [1, 2, 3]], 10)
    assert [len(tokens) for tokens, _ in answers] == [room, 10] == [6, 10]  # the context ends first
    assert generate(model, [], 5) == []


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
        generate(model, [[1, 2], [1] * n], **{"max_tokens": 5, **options})


def test_a_token_outside_the_vocabulary():
    model = noise_(GPTOSS(tiny_config()))
    with pytest.raises(ValueError, match="token 61: vocab_size is 61"):
        generate(model, [[1, 61]], 5)


# --------------------------------------------------------------------------------------------------
# Drawing


def frequencies(probabilities, n=20_000, **options):
    logits = torch.tensor(probabilities).log().expand(n, -1)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn, _ = draw(logits, uniform=uniform, **options)
    return drawn.bincount(minlength=len(probabilities)) / n


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.2, 0.5, 0.0, 0.3]),
        (0.5, 1.0, [4 / 38, 25 / 38, 0.0, 9 / 38]),  # squares
        (1.0, 0.8, [0.0, 5 / 8, 0.0, 3 / 8]),
        (1.0, 0.79, [0.0, 5 / 8, 0.0, 3 / 8]),  # the token that crosses the line is in
        (1.0, 0.81, [0.2, 0.5, 0.0, 0.3]),
        (0.5, 0.6, [0.0, 1.0, 0.0, 0.0]),  # of the distribution at that temperature
        (1.0, 1e-9, [0.0, 1.0, 0.0, 0.0]),
        (0, 1.0, [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_temperature_and_top_p(temperature, top_p, expected):
    probabilities = [0.2 - 1e-4, 0.5 + 1e-4, 0.0, 0.3]  # so that no sum is exactly top_p
    found = frequencies(probabilities, temperature=temperature, top_p=top_p)
    assert torch.allclose(found, torch.tensor(expected), atol=0.012)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


@pytest.mark.parametrize(
    "temperature, top_p, expected",
    [
        (1.0, 1.0, [0.4, 0.0, 0.0, 0.6]),
        (1.0, 0.5, [0.0, 0.0, 0.0, 1.0]),  # a share of what may be drawn
        (0, 1.0, [0.0, 0.0, 0.0, 1.0]),
    ],
)
def test_what_may_not_be_drawn_never_is(temperature, top_p, expected):
    drawable = torch.tensor([True, False, True, True])
    options = {"temperature": temperature, "top_p": top_p, "drawable": drawable}
    found = frequencies([0.2, 0.5, 0.0, 0.3], **options)
    assert torch.allclose(found, torch.tensor(expected), atol=0.012)
    assert ((found > 0) == (torch.tensor(expected) > 0)).all()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_ends_of_the_uniform_numbers(top_p):
    """0 draws no token without probability, and the largest number below 1 the last with one."""
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    logits = torch.tensor([0.0, 0.4, 0.0, 0.6, 0.0]).log().expand(2, -1)
    drawn, logprobs = draw(logits, 1.0, top_p, uniform)
    assert set(drawn.tolist()) == {1, 3}
    torch.testing.assert_close(logprobs, logits.gather(1, drawn[:, None])[:, 0])


def test_what_may_be_drawn_can_be_unlikely():
    logits, drawable = torch.tensor([[0.0, -70.0, -70.0]]), torch.tensor([False, True, True])
    for uniform, token in (0.25, 1), (0.75, 2):
        drawn, logprob = draw(logits, 1.0, 1.0, torch.tensor([uniform]), drawable)
        assert drawn.item() == token and logprob.item() == -70


def test_each_sequence_is_drawn_from_its_own_logits():
    logits = torch.tensor([[0.0, 9.0, 9.0, 0.0], [9.0, 0.0, 0.0, 9.0]]).repeat(500, 1)
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = draw(logits, 1.0, 0.9, uniform)[0].view(500, 2)
    assert set(drawn[:, 0].tolist()) == {1, 2} and set(drawn[:, 1].tolist()) == {0, 3}


# --------------------------------------------------------------------------------------------------
# A decoder that is kept


def update(model):
    """An optimizer's step, which changes the weights in place."""
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    tokens = torch.arange(24).view(1, 24) % 61
    model(tokens, tokens.roll(-1, 1)).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("temperature, top_p", [(0.6, 0.8), (0, 1.0)])
def test_a_kept_decoder_draws_as_a_new_one_after_an_update(temperature, top_p):
    model = noise_(GPTOSS(tiny_config()))
    prompts, allowed = make_prompts(model.config), torch.arange(61) % 3 > 0
    settings = 3, 60, temperature, top_p, allowed
    kept = Decoder(model, *settings)
    for asked, seeds in (prompts, [4, 0, 9, 4, 5, 6]), (prompts[:3], [3, 3, 1]):
        expected = Decoder(model, *settings).answers(asked, 12, seeds=seeds)
        assert kept.answers(asked, 12, seeds=seeds) == expected  # log p, too, to the last bit
        update(model)
        again = kept.answers(asked, 12, seeds=seeds)
        assert any(one.tokens != other.tokens for one, other in zip(again, expected))
    options = {"temperature": temperature, "top_p": top_p, "drawable": allowed, "together": 3}
    assert kept.answers(prompts, 12) == generate(model, prompts, 12, **options)


def test_capacity_is_for_prompt_and_answer():
    model = noise_(GPTOSS(tiny_config()))
    decoder, whole = Decoder(model, 2, 30), generate(model, [[1] * 29, [1, 2, 3]], 40)
    answers = decoder.answers([[1] * 29, [1, 2, 3]], 40)
    assert [len(tokens) for tokens, _ in answers] == [1, 27]
    assert answers[1].tokens == whole[1].tokens[:27]
    with pytest.raises(ValueError, match="capacity=30 leaves no room to answer a prompt of 30 tok"):
        decoder.answers([[1, 2], [1] * 30], 5)
    with pytest.raises(ValueError, match="max_tokens=0"):
        decoder.answers([[1, 2]], 0)


class Recorded:
    """In CUDAGraph's place: a replay repeats the step with each weight in the memory that it had
    at the capture."""

    capturing = None  # the Recorded that notes the next step

    def replay(self):
        now = {}
        for p, memory in self.weights.items():
            now[p], p.data = p.data, memory
        ADVANCE(self.decoder, self.T)
        for p, memory in now.items():
            p.data = memory

    def pool(self):
        return "a pool"


ADVANCE = Decoder.advance


@contextlib.contextmanager
def capture(graph, pool):
    Recorded.capturing = graph
    yield
    Recorded.capturing = None


def advance_or_capture(decoder, T):
    if graph := Recorded.capturing:
        graph.decoder, graph.T = decoder, T
        graph.weights = {p: p.data for p in decoder.model.parameters()}
    else:
        ADVANCE(decoder, T)


def test_captured_steps_are_kept_as_long_as_the_weights_stay(monkeypatch):
    """An update leaves a weight at its address. If it moves, all steps are captured anew."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(Decoder, "advance", advance_or_capture)
    model, prompts = noise_(GPTOSS(tiny_config())), [[1, 2, 3], [4], [5, 6]]
    kept, graphs = Decoder(model, 2, 60, graphs=True), []
    for moved in (), (), (model.embedding.weight,), (), (model.blocks[2].mlp.down_bias,):
        for parameter in moved:
            memory, parameter.data = parameter.data, parameter.data.clone()
            memory.fill_(torch.nan)
        assert kept.answers(prompts, 9) == generate(model, prompts, 9, together=2)
        graphs.append(list(kept.graphs.values()))
        update(model)
    assert len(graphs[0]) > 8
    for n, same in (1, True), (2, False), (3, True), (4, False):
        assert len(graphs[n]) == len(graphs[0])
        assert all((one is other) == same for one, other in zip(graphs[n - 1], graphs[n]))


# --------------------------------------------------------------------------------------------------
# Sharded models


def check_a_kept_decoder(mesh, prompts, batch):
    """Of a model that FSDP stores in fp32, gathers in bf16 and shards between draws."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = GPTOSS(tiny_config(num_key_value_heads=2))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    decoder, optimizer = Decoder(noise_(model), 2, 60), torch.optim.SGD(model.parameters(), 3.0)
    assert {x.dtype for x in decoder.keys} == {torch.bfloat16}
    drawn = []
    for _ in range(2):
        drawn.append(decoder.answers(prompts, 8))
        assert drawn[-1] == Decoder(model, 2, 60).answers(prompts, 8)
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert drawn[0] != drawn[1]


def generate_on_a_rank(share_sequences):
    """This rank's answers from an FSDP-wrapped model, its loss and gradients after them, twice the
    same; how often its root and all its parts were gathered; and how many rows a rank holds of a
    parameter when they are not."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (ranks,))
    if share_sequences:
        sp.init(mesh)
    model = GPTOSS(tiny_config(num_key_value_heads=2))
    for part in [*model.blocks, model]:
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    model = noise_(model)
    prompts = make_prompts(model.config)[rank::ranks][: 3 - rank]  # not as many on every rank
    tokens = torch.arange(24).view(1, 24) % 61
    batch = [torch.roll(tokens, -shift, 1)[:, 12 * rank :][:, :12] for shift in (0, 1)]
    gathers, unshard, rows = [], FSDPModule.unshard, set()

    def noted(part, *arguments):
        gathers.append(part is model)
        return unshard(part, *arguments)

    FSDPModule.unshard = noted
    results = []
    for _ in range(2):
        results.append(tokens_of(generate(model, prompts, 8, seeds=[rank] * len(prompts))))
        rows.update(p.to_local().shape[0] for p in (model.embedding.weight, model.norm.weight))
        loss = model(*batch)
        loss.backward()
        norms = [p.grad.full_tensor().norm().item() for p in model.parameters()]
        results.append((loss.item(), norms))
        model.zero_grad()
    FSDPModule.unshard = unshard
    assert results[:2] == results[2:]
    check_a_kept_decoder(mesh, prompts, batch)
    return (*results[:2], sum(gathers), len(gathers), rows)


@pytest.mark.parametrize("share_sequences", [False, True])
def test_a_sharded_model_generates(share_sequences):
    """Each rank for its own prompts, also before FSDP has seen a forward. Weights are gathered once
    per call and freed after it."""
    model = noise_(GPTOSS(tiny_config(num_key_value_heads=2)))
    prompts = make_prompts(model.config)
    results = run_ranks(2, generate_on_a_rank, share_sequences)
    for rank, (tokens, loss, roots, gathers, rows) in enumerate(results):
        mine = prompts[rank::2][: 3 - rank]
        assert tokens == tokens_of(generate(model, mine, 8, seeds=[rank] * len(mine)))
        assert roots == 2 and gathers == 2 * (model.config.num_hidden_layers + 1)
        assert rows == {31 - rank, 10}  # of 61 and 20
        assert min(loss[0], *loss[1]) > 0


def test_what_generate_returns():
    model = noise_(GPTOSS(tiny_config()))
    (answer,) = generate(model, [torch.tensor([1, 2, 3])], 4)
    assert isinstance(answer, Answer) and len(answer.tokens) == len(answer.logprobs) == 4
    assert isinstance(functools.reduce(max, answer.tokens), int)
