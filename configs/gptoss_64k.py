"""gpt-oss-20b, every parameter trained, on sequences of 65,536 tokens, on one node of eight 80 GB
GPUs.

python convert_hf.py openai/gpt-oss-20b
python data.py corpus.jsonl --out data/corpus
torchrun --nproc_per_node 8 train.py configs/gptoss_64k.py
"""

checkpoint = "checkpoints/gpt-oss-20b"
data = "data/corpus"

ranks = 8
# Pairs share each sequence: 32,768 of its tokens each, and in attention half of the heads.
# Rehearsed on an H100, sp = 1 with keep_blocks = 2 takes 4 % less time, and 69 GiB instead of 63:
# try it once this has run on your eight. At sp = 8 a GPU needs 53 GiB, but a step has 8
# micro-batches instead of 2, and FSDP gathers all weights for each of them.
sp = 2
seq_len = 64 * 1024
batch_size = 8  # 524,288 tokens per step = 2 micro-batches x 4 groups x 1 sequence x 65,536 tokens
micro_batch = 1

optimizer = "fp32"  # 335 GB over eight GPUs: 42 GB each
recompute = "attention"  # 64 GiB of 79 by the dry run

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50  # 251 GB each, up to three on disk: docs/training.md
