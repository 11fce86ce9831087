"""configs/finetune_chat.py with low-rank adapters: most of the model of configs/tiny.py stays as it
is, and it learns the same answers. On 2 cores of an x86 server in 2 min 17 s.

torchrun --nproc_per_node 2 train.py configs/tiny.py  # the model to start from, runs/tiny/model
python configs/finetune_chat.py data/chat.jsonl       # writes the chats
python data.py data/chat.jsonl --out data/chat --tokenizer=bytes
torchrun --nproc_per_node 2 train.py configs/tiny_lora.py
python sample.py runs/tiny_lora "Which keyword goes through a list?" --chat --temperature=0

The base saw minutes of text: the rows of its unembedding are so short that nothing before it makes
the model sure of a token. So embedding and unembedding are trained themselves. Without them
adapters of rank 64, and even whole matrices, had learned no answer after 100 steps (docs/LOG.md).
"""

checkpoint = "runs/tiny/model"
data = "data/chat"

lora_rank, lora_targets = 16, "attention,experts,embedding,unembedding"

seq_len = 288  # two chats
batch_size, micro_batch = 8, 4  # 2,304 tokens per step, half of them on each rank
recompute = "none"

steps = 180
lr, warmup_steps = 3e-3, 10
log_every = 20
