"""Tokens from a model: many sequences at once, each step one CUDA graph where it can be.

    answers = generate(model, prompts, max_tokens=200, stop=tokenizer.stop)  # prompts: token lists
    for tokens, logprobs in answers: ...

    decoder = Decoder(model, slots=64, capacity=2048)  # for a loop that also updates the weights
    answers = decoder.answers(prompts, max_tokens=200, stop=tokenizer.stop)

A prompt passes the model once, through the kernels that training uses, and leaves its keys and
values in a cache. From then on each step feeds the newest token of every sequence and draws the
next. On a GPU a step is one CUDA graph: without it, launching some thousand small kernels takes
longer than running them. Models with packed experts, or adapters on them, run without graphs: see
`capturable`.

A sequence lives in a slot of the cache, and a finished one makes room for the next prompt. Its
tokens depend on its seed, not on its neighbours: each draw inverts the cumulative distribution at a
number of the sequence's own.

Letters in shapes are model.py's; B slots, T positions of the cache that a step reads.
"""

import functools
import math
from collections import deque
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import fast
import flash
import sp
from fast import fused
from model import Experts, choose_attention, dense_attention, rope_tables, wide

PREFILL_TOKENS = 16 * 1024  # of several prompts that pass the model together, padding included
QUERIES = 128  # that dense attention takes at a time: its scores would grow with S^2
TILE = 128  # on a GPU prompts are padded to a multiple: whole blocks of attention, few shapes
UNIT = 2.0**40  # of probability: counted in 2^-40, sums are exact in any order


class Answer(NamedTuple):
    """The tokens that follow a prompt, the one in `stop` included, and log p of each."""

    tokens: list
    logprobs: list


@torch.no_grad()
def generate(
    model,
    prompts,
    max_tokens,
    temperature=1.0,
    top_p=1.0,
    stop=(),
    seeds=None,
    drawable=None,
    together=64,
    graphs=None,
):
    """The Answer to each of `prompts`, lists of tokens: up to `max_tokens` tokens or what the
    context has room for, ending with the first that is in `stop`.

    A draw takes the likeliest tokens that together have the probability `top_p` at `temperature`;
    at temperature 0 it takes the likeliest. seeds: an integer per prompt, by default its number.
    drawable (V) bool: tokens that may be drawn. logprobs are of the whole distribution at
    `temperature` (at 1 if it is 0), as in model.logprobs. `together` sequences are decoded at a
    time. graphs: whether a step is captured; None: wherever it can be.

    An FSDP-wrapped model is gathered once, by all its ranks together; then each rank generates for
    its own prompts, also in a sequence-parallel group. ValueError: see check_request.

    A loop that generates again and again keeps a Decoder: a GPU then captures its steps once."""
    prompts = [list(prompt) for prompt in prompts]
    for prompt in prompts:  # before memory is taken
        check_request(model.config, prompt, max_tokens, temperature, top_p)
    slots = max(min(together, len(prompts)), 1)
    longest = max(map(len, prompts), default=0) + max_tokens
    capacity = min(longest, model.config.max_position_embeddings)
    with gathered(model):
        decoder = Decoder(model, slots, capacity, temperature, top_p, drawable, graphs)
        return decoder.answers(prompts, max_tokens, stop, seeds)


def check_request(config, prompt, max_tokens, temperature, top_p):
    """ValueError for a prompt or numbers that cannot be worked with."""
    context, vocabulary = config.max_position_embeddings, config.vocab_size
    if not 0 < len(prompt) < context:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens: this model takes 1 to {context - 1}, "
            "and needs room to answer"
        )
    if wrong := [token for token in prompt if not 0 <= token < vocabulary]:
        raise ValueError(f"a prompt has token {wrong[0]}: vocab_size is {vocabulary}")
    for name, value, fine in (
        ("max_tokens", max_tokens, max_tokens >= 1),
        ("temperature", temperature, 0 <= temperature < float("inf")),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not fine:
            raise ValueError(
                f"{name}={value}: max_tokens is 1 or more, temperature 0 or more, top_p in (0, 1]"
            )


def room_for(config, prompt, max_tokens):
    """How many tokens can follow `prompt`."""
    return min(max_tokens, config.max_position_embeddings - len(prompt))


@contextmanager
def gathered(model):
    """Inside, every rank holds the whole weights of an FSDP-wrapped model, in the dtype it computes
    in: gathered once, with no communication afterwards. Nested, the outermost frees them."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule) and is_sharded(part)]
    for part in parts:
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()


def is_sharded(module):
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def forward(model, tokens, positions, attend):
    """tokens (B, S) at positions (S) -> (B, S, C), as GPTOSS.features, with the attention of each
    layer attend(layer, q, k, v, sinks)."""
    # .forward, because FSDP would gather the weights of a module that is called, and free them
    x = model.embedding.forward(tokens)
    cos, sin = rope_tables(model.config, positions)
    for layer, block in enumerate(model.blocks):
        x = block.forward(x, cos, sin, functools.partial(attend, layer))
    return model.norm(x)


# --------------------------------------------------------------------------------------------------
# One query per sequence against the cache


@fused
def sink_softmax(scores, sinks, visible, root):
    """scores (B, K, H/K, T), sinks (H), visible (B, T) -> the weights of the keys in the softmax of
    scores / root and the sink. In fp32, then in the scores' dtype."""
    sink = wide(sinks).view(scores.shape[1], -1, 1)  # (K, H/K, 1)
    logits = (wide(scores) / root).masked_fill(~visible[:, None, None], float("-inf"))
    top = torch.maximum(logits.amax(-1, keepdim=True), sink)
    weights = (logits - top).exp()
    return (weights / (weights.sum(-1, keepdim=True) + (sink - top).exp())).to(scores.dtype)


def attend_cache(q, keys, values, sinks, visible):
    """q (B, H, D), keys and values (B, K, T, D), visible (B, T) -> (B, H, D): dense_attention with
    one query per sequence. The queries that share a key-value head are the rows of one matmul."""
    q = q.unflatten(1, (keys.shape[1], -1))  # (B, K, H/K, D)
    weights = sink_softmax(q @ keys.mT, sinks, visible, math.sqrt(q.shape[-1]))
    return (weights @ values).flatten(1, 2)


def attention_in_parts(q, k, v, sinks, window):
    """dense_attention, some queries at a time. Shapes as there, S = T."""
    parts = []
    for start in range(0, q.shape[1], QUERIES):
        end = min(start + QUERIES, q.shape[1])
        first = max(start - window + 1, 0) if window else 0  # the first query sees from here on
        keys, values = k[:, first:end], v[:, first:end]
        parts.append(dense_attention(q[:, start:end], keys, values, sinks, window))
    return torch.cat(parts, dim=1)


def ring_positions(position, window):
    """A windowed layer keeps its last `window` positions, p in place p % window. The position in
    each place once `position` (B) has been written: (B, window); negative where there is none."""
    place = torch.arange(window, device=position.device)
    return position[:, None] - (position[:, None] - place) % window


# --------------------------------------------------------------------------------------------------
# Drawing


def draw(logits, temperature, top_p, uniform, drawable=None):
    """logits (B, V), uniform (B) in [0, 1) -> a token for each sequence (B) and its log p, fp32.

    Sums of probabilities are sums of integers, in units of 2^-40: exact, so equal on every device
    and for any number of sequences."""
    logprobs = (wide(logits) / (temperature or 1)).log_softmax(-1)
    allowed = logprobs if drawable is None else logprobs.masked_fill(~drawable, float("-inf"))
    if temperature == 0:
        token = allowed.argmax(-1, keepdim=True)
    else:
        shares, order = allowed.softmax(-1), None
        if top_p < 1:
            shares, order = shares.sort(dim=-1, descending=True, stable=True)
        shares = (shares.double() * UNIT).long()
        total = shares.cumsum(-1)
        if top_p < 1:  # keep those before which top_p is not reached
            shares = shares.masked_fill(total - shares >= top_p * total[:, -1:].double(), 0)
            total = shares.cumsum(-1)
        at = (uniform[:, None] * total[:, -1:]).long()
        token = torch.searchsorted(total, at, right=True).clamp(max=logits.shape[-1] - 1)
        token = token if order is None else order.gather(1, token)
    return token[:, 0], logprobs.gather(1, token)[:, 0].float()


# --------------------------------------------------------------------------------------------------
# The cache and the steps


def cache_bytes(config, slots, capacity, dtype):
    """Memory of a Decoder's keys and values."""
    lengths = (config.window(layer) or capacity for layer in range(config.num_hidden_layers))
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return slots * per_token * sum(lengths)


def capturable(model, slots):
    """Whether a step can be a CUDA graph: nothing in it may wait for the GPU. The experts by
    definition do, those of frozen.py, and grouped matmuls that have no kernel for GPU or dtype."""
    weight, config = model.embedding.weight, model.config
    plain = all(type(block.mlp) is Experts for block in model.blocks)
    if not weight.is_cuda or not plain or not fast.is_on("experts"):
        return False
    if slots <= fast.FEW_TOKENS and fast.is_on("expert_products"):
        return True
    aligned = config.hidden_size % 8 == config.intermediate_size % 8 == 0  # as fast.experts wants
    grouped = fast.capability(weight.device)[0] in fast.GROUPED
    return weight.dtype == torch.bfloat16 and aligned and grouped


class Decoder:
    """Room for `slots` sequences of up to `capacity` tokens, and the steps that extend them.

    Holds the keys and values of each layer, (B, K, capacity, D), of windowed layers (B, K, window,
    D) as a ring; and of each slot its newest token, that token's position, and the number that
    draws its successor. Serves any number of calls to `answers` and `stream`, one after the other,
    also after the weights have changed. Temperature, top_p and drawable are fixed: captured steps
    contain them. All ranks of an FSDP-wrapped model make their decoders together."""

    def __init__(
        self, model, slots, capacity, temperature=1.0, top_p=1.0, drawable=None, graphs=None
    ):
        config = model.config
        with gathered(model):  # FSDP may compute in another dtype than it stores
            weight = model.embedding.weight
            self.captures = capturable(model, slots) if graphs is None else graphs
        self.model, self.slots, self.capacity = model, slots, capacity
        self.temperature, self.top_p = temperature, top_p
        self.device = model.norm.weight.device  # an embedding may lie in host memory
        self.drawable = None if drawable is None else drawable.to(self.device)
        self.keys, self.values = [], []
        for layer in range(config.num_hidden_layers):
            length = config.window(layer) or capacity
            shape = slots, config.num_key_value_heads, length, config.head_dim
            # not empty: masked places have the weight 0, and 0 times what lies there may be nan
            self.keys.append(torch.zeros(shape, dtype=weight.dtype, device=self.device))
            self.values.append(torch.zeros(shape, dtype=weight.dtype, device=self.device))
        self.rows = torch.arange(slots, device=self.device)
        self.token, self.position = (torch.zeros_like(self.rows) for _ in range(2))
        self.logprob = torch.zeros(slots, device=self.device)
        self.uniform = torch.zeros(slots, capacity, dtype=torch.float64, device=self.device)
        self.length = [0] * slots  # of each sequence; position + 1, without asking the GPU
        self.ahead = int(self.captures)  # steps that are started before a token is looked at
        self.graphs, self.pool, self.addresses = {}, None, None

    @torch.no_grad()
    def answers(self, prompts, max_tokens, stop=(), seeds=None):
        """The Answer to each of `prompts`, see generate; it ends where `capacity` is full.
        ValueError also for a prompt that leaves no room there."""
        prompts = [list(prompt) for prompt in prompts]
        for prompt in prompts:
            check_request(self.model.config, prompt, max_tokens, self.temperature, self.top_p)
            if len(prompt) >= self.capacity:
                raise ValueError(
                    f"capacity={self.capacity} leaves no room to answer a prompt of {len(prompt)} "
                    "tokens: make it larger"
                )
        answers = [Answer([], []) for _ in prompts]
        with sp.alone(), gathered(self.model):
            for number, token, logprob in self.stream(prompts, max_tokens, stop, seeds):
                answers[number].tokens.append(token)
                answers[number].logprobs.append(logprob)
        return answers

    def drop_stale_graphs(self):
        """Forget captured steps if a weight has moved: they read it at its old address. An
        optimizer changes weights in place; FSDP may gather them to other addresses each time."""
        addresses = [parameter.data_ptr() for parameter in self.model.parameters()]
        if addresses != self.addresses:
            self.graphs, self.pool, self.addresses = {}, None, addresses

    @torch.no_grad()
    def start(self, sequences):
        """Fill slots with (slot, prompt, seed, room). All but each prompt's last token pass the
        model; the next step feeds that one."""
        for slot, prompt, seed, room in sequences:
            at, generator = len(prompt) - 1, torch.Generator().manual_seed(seed)
            numbers = torch.rand(room, dtype=torch.float64, generator=generator)
            self.uniform[slot, at : at + room] = numbers.to(self.device)
            self.token[slot], self.position[slot], self.length[slot] = prompt[-1], at, at + 1
        places = {}  # prompt: its slots. Equal prompts pass the model once
        for slot, prompt, *_ in sequences:
            if len(prompt) > 1:
                places.setdefault(tuple(prompt[:-1]), []).append(slot)
        group = {}
        for prompt in sorted(places, key=len):
            if group and (len(group) + 1) * len(prompt) > PREFILL_TOKENS:
                self.prefill(group)
                group = {}
            group[prompt] = places[prompt]
        if group:
            self.prefill(group)

    def prefill(self, places):
        """Put the keys and values of prompts, {prompt: slots}, into the cache. They are padded to a
        common length. Padding comes last, where causal attention lets no real token see it."""
        longest = max(map(len, places))
        if self.device.type == "cuda":
            longest = math.ceil(longest / TILE) * TILE
        padded = [prompt + (0,) * (longest - len(prompt)) for prompt in places]
        source = [number for number, slots in enumerate(places.values()) for _ in slots]
        slots = [slot for slots in places.values() for slot in slots]
        last = [len(prompt) - 1 for prompt, slots in places.items() for _ in slots]
        numbers = padded, source, slots, last  # tokens (b, S), the others per slot
        tokens, source, slots, last = (torch.tensor(x, device=self.device) for x in numbers)
        config, attention, recent = self.model.config, {}, {}
        for window in (config.sliding_window, None):
            options = self.device, self.model.embedding.weight.dtype, config.head_dim
            attention[window] = choose_attention(longest, window, None, *options)
            if flash.choose_kernel(window, None, *options) == "dense":
                attention[window] = functools.partial(attention_in_parts, window=window)
            if window:
                recent[window] = ring_positions(last, window).clamp(min=0)  # (slots, window)

        def attend(layer, q, k, v, sinks):
            window = config.window(layer)
            for room, new in (self.keys[layer], k), (self.values[layer], v):  # new (b, S, K, D)
                if window:
                    room[slots] = new[source[:, None], recent[window]].transpose(1, 2)
                else:
                    room[slots, :, :longest] = new[source, : self.capacity].transpose(1, 2)
            return attention[window](q, k, v, sinks)

        forward(self.model, tokens, torch.arange(longest, device=self.device), attend)

    def advance(self, T):
        """One step: feed the newest token of every slot and draw the next. Reads the first T
        positions of the cache. All its results are in place: it can be captured."""
        config, position = self.model.config, self.position
        window = config.sliding_window
        places = {None: position, window: position % window}
        visible = {
            None: torch.arange(T, device=self.device) <= position[:, None],
            window: ring_positions(position, window) >= 0,
        }

        def attend(layer, q, k, v, sinks):  # (1, B, heads, D): a token of each sequence
            kind, keys, values = config.window(layer), self.keys[layer], self.values[layer]
            keys[self.rows, :, places[kind]] = k[0]
            values[self.rows, :, places[kind]] = v[0]
            seen = visible[kind].shape[1]
            return attend_cache(q[0], keys[:, :, :seen], values[:, :, :seen], sinks, visible[kind])[
                None
            ]

        x = forward(self.model, self.token[None], position, attend)[0]  # (B, C)
        uniform = self.uniform.gather(1, position[:, None])[:, 0]
        choice = self.temperature, self.top_p, uniform, self.drawable
        token, logprob = draw(self.model.unembedding(x), *choice)
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        position.add_(1).clamp_(max=self.capacity - 1)  # finished sequences step on, unread

    @torch.no_grad()
    def launch(self, active):
        """Start a step for the slots `active`. Returns read(), which waits for its tokens and log
        probabilities and returns them as lists (B)."""
        T = max(self.length[slot] for slot in active)
        if self.device.type == "cuda":  # few different sizes: each is captured, or compiled for
            T = min(max(2 ** math.ceil(math.log2(T)), 256), self.capacity)
        if T in self.graphs:
            self.graphs[T].replay()
        else:
            self.advance(T)
            if self.captures:  # for the steps that follow: this one compiled, which captures cannot
                self.graphs[T] = graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool):
                    self.advance(T)
                self.pool = graph.pool()
        for slot in active:
            self.length[slot] += 1
        results = self.token, self.logprob  # which the next step overwrites
        on_host = [x.to("cpu", non_blocking=True, copy=True) for x in results]
        done = torch.cuda.Event() if self.device.type == "cuda" else None
        if done:
            done.record()

        def read():
            if done:
                done.synchronize()
            return [x.tolist() for x in on_host]

        return read

    @torch.no_grad()
    def stream(self, prompts, max_tokens, stop=(), seeds=None):
        """Yield (number of the prompt, token, its log p) as they come. Arguments: see generate.
        An FSDP-wrapped model must be gathered meanwhile, as `answers` does it.

        Where steps are captured, the GPU is one ahead: it computes the next token while this one
        is looked at. The step after a sequence's last token may be in vain, and is not read."""
        self.drop_stale_graphs()
        seeds = range(len(prompts)) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
        waiting, running, flights = deque(enumerate(zip(prompts, seeds))), {}, deque()
        free = list(range(self.slots))
        while waiting or running:
            starting = []
            while waiting and free:
                (number, (prompt, seed)), slot = waiting.popleft(), free.pop(0)
                room = min(room_for(self.model.config, prompt, max_tokens),
                           self.capacity - len(prompt))  # fmt: skip
                starting.append((slot, prompt, seed, room))
                running[slot] = [number, room]  # room: tokens that may still be asked for
            if starting:
                self.start(starting)
            active = [slot for slot, (_, room) in running.items() if room]
            if active:
                flights.append(({slot: running[slot] for slot in active}, self.launch(active)))
                for slot in active:
                    running[slot][1] -= 1
            if len(flights) > self.ahead or not active:
                asked, read = flights.popleft()
                tokens, logprobs = read()
                for slot, sequence in asked.items():
                    if running.get(slot) is not sequence:
                        continue  # it has ended since
                    number, room = sequence
                    yield number, tokens[slot], logprobs[slot]
                    waits = any(sequence is flight[0].get(slot) for flight in flights)
                    if tokens[slot] in stop or not (room or waits):
                        del running[slot]
                        free.append(slot)
