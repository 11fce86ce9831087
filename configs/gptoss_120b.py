"""gpt-oss-120b, every parameter trained, on rows of 32,768 tokens, on two nodes of eight 141 GB GPUs.

on each node: torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py configs/gptoss_120b.py
"""

checkpoint = "checkpoints/gpt-oss-120b"
data = "data/corpus"

ranks = 16
sp = 8  # inside a node, where the all-to-all of each layer has NVLink
seq_len = 32 * 1024
batch_size = 16  # 524,288 tokens a step = 8 micro-batches x 2 groups x 1 row x 32,768 tokens
micro_batch = 1

optimizer = "split"  # 1.17 TB over sixteen GPUs: 73 GB each; a copy a node (replicas = 2) would need 146
recompute, keep_blocks = "attention", 24  # 113 GiB of 131 by the dry run

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50
