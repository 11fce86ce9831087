"""gpt-oss-120b, every parameter trained, on rows of 65,536 tokens, on two nodes of eight 141 GB GPUs.

python train.py configs/gptoss_120b.py --dry_run=true --checkpoint= --num_hidden_layers=36 --num_experts=128
on each node: torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py configs/gptoss_120b.py
"""

checkpoint = "checkpoints/gpt-oss-120b"
data = "data/corpus"

ranks = 16
sp = 2  # neighbours in a node share each row: 32,768 of its tokens, and in attention half of the heads, each
seq_len = 64 * 1024
batch_size = 8  # 524,288 tokens a step = 1 micro-batch x 8 groups x 1 row x 65,536 tokens: weights are gathered once
micro_batch = 1

optimizer = (
    "split"  # 1.17 TB over sixteen GPUs: 73 GB each; a copy a node (replicas = 2) would need 146
)
recompute = "attention"  # 109 GiB of 140 by the dry run

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50
