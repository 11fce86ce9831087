"""gpt-oss-20b, every parameter trained, on rows of 65,536 tokens, on one node of eight 80 GB GPUs.

python convert_hf.py openai/gpt-oss-20b
python data.py corpus.jsonl --out data/corpus
torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py
"""

checkpoint = "checkpoints/gpt-oss-20b"
data = "data/corpus"

ranks = 8
sp = 8  # all eight share each row: 8,192 of its tokens, and in attention 8 of 64 query heads and 1 of 8 key-value heads, each
seq_len = 64 * 1024
batch_size = 8  # 524,288 tokens a step = 8 micro-batches x 1 group x 1 row x 65,536 tokens
micro_batch = 1

optimizer = "fp32"  # 335 GB over eight GPUs: 42 GB each
recompute, keep_blocks = "attention", 12  # 62 GiB of 74 by the dry run

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50
