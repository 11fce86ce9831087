"""configs/finetune_chat.py with low-rank adapters: the model of configs/tiny.py stays as it is.

The adapters learn the form of an answer; which keyword it names only full tuning was seen to learn.

torchrun --nproc_per_node 2 train.py configs/tiny.py  # the model to start from, runs/tiny/model
python configs/finetune_chat.py data/chat.jsonl       # writes the chats
python data.py data/chat.jsonl --out data/chat --tokenizer=bytes
python train.py configs/tiny_lora.py
python sample.py runs/tiny_lora "Which keyword goes through a list?" --chat --temperature=0
"""

checkpoint = "runs/tiny/model"
data = "data/chat"

lora_rank, lora_targets = 16, "attention,experts"

seq_len = 288  # two chats
batch_size, micro_batch = 8, 8  # 2,304 tokens per step
recompute = "none"

steps = 180
lr, warmup_steps = 1e-2, 10
log_every = 20
