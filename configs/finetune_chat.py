"""Teach the model of configs/tiny.py to answer which of Python's keywords does what, on a
laptop, without a download.

torchrun --nproc_per_node 2 train.py configs/tiny.py  # the model to start from, runs/tiny/model
python configs/finetune_chat.py data/chat.jsonl       # writes the chats: see the end of this file
python data.py data/chat.jsonl --out data/chat --tokenizer=bytes
torchrun --nproc_per_node 2 train.py configs/finetune_chat.py
python sample.py runs/finetune_chat "Which keyword goes through a list?" --chat --temperature=0

Five chats are held back, in data/chat-val.jsonl, to ask afterwards; encoded as data/chat-val they
are what --eval_every=60 evaluates. The real model is fine-tuned by the same commands, with
checkpoint = "checkpoints/gpt-oss-20b" from convert_hf.py and data.py's default tokenizer.
"""

checkpoint = "runs/tiny/model"
data = "data/chat"

seq_len = 288  # two chats
batch_size, micro_batch = 8, 4  # 2,304 tokens per step, half of them on each rank
recompute = "none"

steps = 180
lr, warmup_steps = 3e-3, 10
log_every = 20


def _chats():
    """(question, answer) of each chat to train on, every way to ask about every keyword; and of
    five that are held back."""
    ways = [
        "Which keyword {}?",
        "Name the keyword that {}.",
        "What do I write if my code {}?",
        "I want a statement that {}.",
    ]
    keywords = {
        "import": "loads a module",
        "def": "defines a function",
        "class": "makes a new type",
        "return": "gives back a value",
        "for": "goes through a list",
        "while": "repeats as long as a test holds",
        "break": "leaves a loop",
        "pass": "does nothing",
        "del": "removes a name",
        "raise": "signals an error",
        "assert": "checks an assumption",
        "with": "enters a context",
        "yield": "hands out values one by one",
        "await": "waits for a coroutine",
        "lambda": "writes a function in one line",
    }
    chats = [
        (way.format(does), f"It is {keyword}.")
        for keyword, does in keywords.items()
        for way in ways
    ]
    held_back = chats[5::11]
    return [chat for chat in chats if chat not in held_back], held_back


if __name__ == "__main__":  # python configs/finetune_chat.py FILE
    import json
    import sys
    from pathlib import Path

    if len(sys.argv) != 2:
        raise SystemExit("name the file to write: python configs/finetune_chat.py data/chat.jsonl")
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, chats in zip((path, path.with_stem(f"{path.stem}-val")), _chats()):
        with open(name, "w") as file:
            for question, answer in chats:
                messages = [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
                file.write(json.dumps({"messages": messages}) + "\n")
