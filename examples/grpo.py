"""Reinforcement learning in one loop: GRPO (Shao et al., https://arxiv.org/abs/2402.03300).

    torchrun --nproc_per_node 2 train.py configs/tiny.py
    python configs/finetune_chat.py data/chat.jsonl
    python data.py data/chat.jsonl --out data/chat --tokenizer=bytes
    torchrun --nproc_per_node 2 train.py configs/finetune_chat.py --steps=140 --name=partly
    torchrun --nproc_per_node 2 -m examples.grpo --lora_rank=8 --lora_layers=1-3 \\
        --lora_targets=attention,experts

A step draws a group of answers to each of some questions and rewards each answer. Its advantage is
how much better it is than the mean of its group, in standard deviations: there is no critic. Tokens
of better answers become likelier and those of worse ones less likely, until the probability has
changed by the factor 1 +- CLIP. The paper's penalty for leaving the first model is left out.

The ranks of a sequence-parallel group train on slices of each answer; each rank draws its answers
alone. Old and new log probabilities take the same routes, so their ratio starts at exactly 1.

The tiny model starts where it knows how an answer looks, and often not the right one: how often,
rounding decides, and so the machine (docs/benchmarks.md). Its first layer stays as it is: a token
that goes to another expert there can undo every answer.

`questions` and `reward` are yours to replace. Options and config files are train.py's, but options
in LACKING are refused. The real model, on eight GPUs:

    torchrun --nproc_per_node 8 -m examples.grpo --checkpoint=checkpoints/gpt-oss-20b \\
        --lora_rank=16 --lr=1e-4 --seq_len=2048 --micro_batch=4 --recompute=attention
"""

import dataclasses
import json
import math
import re
import runpy
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

import sp
import train
from generate import Decoder
from loop.checks import check_model
from loop.guards import fail
from loop.options import parse, short
from model import IGNORED
from sample import chat_prompt, drawable
from text.answers import parse as parse_answer
from text.tokenizer import get_tokenizer
from weights import find_model

GROUP = 8  # answers to each question of a step
UPDATES = 2  # of the weights, on the answers of a step
CLIP = 0.2
EVAL_ANSWERS = 32  # to each question that was kept aside
CHATS = Path(__file__).parent.parent / "configs" / "finetune_chat.py"
DEFAULTS = """--checkpoint=runs/partly --name=grpo --sp=2 --seq_len=160 --batch_size=64
    --micro_batch=32 --recompute=none --steps=16 --eval_every=4 --lr=1e-3 --warmup_steps=2"""
LACKING = {  # options of what train.py does and this loop does not
    "resume", "epochs", "dry_run", "rehearse", "data", "eval_data", "offload", "fast", "stop_after",
    "save_every", "keep", "keep_best", "log_every", "sample", "wandb",
}  # fmt: skip


def questions():
    """(question, answer) to learn from, and those that CHATS holds back, with the same answers."""
    chats, aside = runpy.run_path(str(CHATS))["_chats"]()
    answers = {answer for _, answer in aside}
    return [chat for chat in chats if chat[1] in answers], aside


def reward(messages, answer):
    """1 if the last of a model's messages is a final one, and its last word is the answer's."""
    if not messages or messages[-1].get("channel") != "final":
        return 0.0
    said, wanted = (re.findall(r"\w+", text)[-1:] for text in (messages[-1]["content"], answer))
    return float(said == wanted)


def make_decoder(options, model, tokenizer):
    """The Decoder of all draws: the answers of a step pass it together."""
    slots = math.ceil(options.batch_size / dist.get_world_size())
    texts = drawable(model.config.vocab_size, tokenizer)
    return Decoder(model, slots, options.seq_len, drawable=texts)


def draw(options, decoder, tokenizer, asked, number, seed):
    """`number` answers to each of the questions `asked`: tokens and targets (N, S), of which only
    the answers' count, and rewards (N). Each rank draws a part, and gets them all."""
    asked = [pair for pair in asked for _ in range(number)]
    prompts = [chat_prompt([{"role": "user", "content": q}], tokenizer) for q, _ in asked]
    longest = max(map(len, prompts))
    if longest >= options.seq_len:
        raise ValueError(f"seq_len={options.seq_len}: a question alone has {longest} tokens")
    ranks, seeds = dist.get_world_size(), range(seed << 20, (seed << 20) + len(prompts))
    mine, most = slice(dist.get_rank(), None, ranks), options.seq_len - longest
    drawn = decoder.answers(prompts[mine], most, tokenizer.stop, seeds[mine])
    parts, answers = [None] * ranks, [None] * len(prompts)
    dist.all_gather_object(parts, [answer.tokens for answer in drawn])
    for rank, part in enumerate(parts):
        answers[rank::ranks] = part

    tokens = torch.zeros(len(prompts), options.seq_len, dtype=torch.int64)
    targets, rewards = torch.full_like(tokens, IGNORED), torch.zeros(len(prompts))
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        text, start = torch.tensor(prompt + answer), len(prompt) - 1
        tokens[i, : len(text) - 1] = text[:-1]  # padding comes last, where no token sees it
        targets[i, start : len(text) - 1] = text[len(prompt) :]
        messages = parse_answer([t for t in answer if t not in tokenizer.stop], tokenizer)
        rewards[i] = reward(messages, asked[i][1])
    return tokens, targets, rewards


def weigh(targets, rewards):
    """targets (N, S), rewards (N) in groups -> (N, S): each token's advantage, times its share in
    the mean over answers of the mean over an answer's tokens."""
    groups = rewards.view(-1, GROUP)
    spread = groups.std(1, keepdim=True) + 1e-4  # equal rewards teach nothing
    advantages = ((groups - groups.mean(1, keepdim=True)) / spread).view(-1, 1)
    counted = targets != IGNORED
    return advantages * counted / counted.sum(1, keepdim=True) / len(targets)


def prepare(options, model, device, *whole):
    """tokens, targets and weights (N, S) -> this rank's slices of them, a micro-batch at a time,
    with the routes and log probabilities that the model has now."""
    for mine in train.my_sequences(options, 0, len(whole[0])):
        tokens, targets, weights = (x.to(device) for x in sp.shard(*(x[mine] for x in whole)))
        routes = model.routes(tokens)
        with torch.no_grad():
            old = model.logprobs(tokens, targets, routes=routes)
        yield tokens, targets, weights, routes, old


def objective(logp, old, weights):
    """What GRPO maximises, of log probabilities, old ones and weights (B, S) -> 0-d."""
    ratio = (logp - old).exp()
    return torch.minimum(ratio * weights, ratio.clamp(1 - CLIP, 1 + CLIP) * weights).sum()


def update(options, model, optimizer, batches, lr):
    """One update of the weights with the gradient of all batches. Returns its norm."""
    for tokens, targets, weights, routes, old in batches:
        (-objective(model.logprobs(tokens, targets, routes=routes), old, weights)).backward()
    squares = train.gradient_norm_squared(model) / options.replicas
    norm = math.sqrt(train.all_sum(squares, device=squares.device)[0])
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient's norm is {norm}: try a smaller --lr")
    if norm > options.grad_clip > 0:
        train.scale_gradients_(model, options.grad_clip / norm)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


def evaluates(options, step):
    """Whether the questions that were kept aside are asked before this step, or after the last."""
    every = options.eval_every
    return every > 0 and (step % every == 0 or step == options.steps)


def record(file, **values):
    if dist.get_rank() == 0:
        line = json.dumps({name: round(value, 4) for name, value in values.items()})
        print(line, flush=True)
        with open(file, "a") as lines:
            lines.write(line + "\n")


def check_options(options):
    """ValueError for an option in LACKING, and for none of the model to start from."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name in LACKING and value != field.default:
            given = f"{field.name}={short(value, str)}"
            raise ValueError(f"{given} is an option of train.py that GRPO lacks: leave it out")
    if not options.checkpoint:
        raise ValueError("checkpoint= is empty: name the model that gives the first answers")


def learn(options):
    """The whole run. Its model is in runs/NAME/model at the end."""
    check_options(options)
    options, config = check_model(options)
    tokenizer = get_tokenizer(find_model(options.checkpoint).tokenizer or "o200k_harmony")
    (to_learn, aside), questions_per_step = questions(), options.batch_size // GROUP
    if options.batch_size % GROUP or questions_per_step > len(to_learn):
        wanted = f"a multiple of {GROUP} answers, to at most {len(to_learn)} questions"
        raise ValueError(f"batch_size={options.batch_size} must be {wanted}")

    device, mesh = train.start_ranks(options)
    dtype = train.computed_in(device)
    model = train.build_model(options, config, device, mesh, dtype)
    optimizer = train.build_optimizer(options, model)
    # log probabilities are a view, in which FSDP forbids to write: nothing here does
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    decoder = make_decoder(options, model, tokenizer)
    folder = Path("runs") / options.name
    metrics, shuffle = folder / "metrics.jsonl", torch.Generator().manual_seed(options.seed)
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        settings = dataclasses.asdict(options) | {"tokenizer": tokenizer.name}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    for step in range(options.steps + 1):
        if evaluates(options, step):
            *_, rewards = draw(options, decoder, tokenizer, aside, EVAL_ANSWERS, seed=step)
            record(metrics, step=step, aside=rewards.mean().item())
        if step == options.steps:
            break
        start, seed = time.perf_counter(), (options.seed + 1) * 10_000 + step
        picked = torch.randperm(len(to_learn), generator=shuffle)[:questions_per_step]
        asked = [to_learn[i] for i in picked]
        tokens, targets, rewards = draw(options, decoder, tokenizer, asked, GROUP, seed)
        weights = weigh(targets, rewards)
        batches = list(prepare(options, model, device, tokens, targets, weights))
        lr = train.learning_rate(options, step)
        norm = max(update(options, model, optimizer, batches, lr) for _ in range(UPDATES))
        seconds = time.perf_counter() - start
        record(metrics, step=step, reward=rewards.mean().item(), grad_norm=norm, seconds=seconds)
    train.save_model(options, model, folder, dtype, None)
    dist.barrier()
    dist.destroy_process_group()


def main(arguments):
    options = None
    try:
        usage = f"{__doc__}\nIts own defaults: {DEFAULTS}"
        options = parse(arguments, usage, DEFAULTS)
        learn(options)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        fail(error, options, lacking=LACKING)


if __name__ == "__main__":
    main(sys.argv[1:])
