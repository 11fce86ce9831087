"""gpt-oss-120b, every parameter trained, on sequences of 65,536 tokens, on two nodes of eight
141 GB GPUs.

python train.py configs/gptoss_120b.py --dry_run
on each node: torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d \\
    --rdzv_endpoint HOST:29500 train.py configs/gptoss_120b.py
"""

checkpoint = "checkpoints/gpt-oss-120b"
num_hidden_layers, num_experts = 36, 128  # as in the checkpoint, for a dry run without it
data = "data/corpus"

ranks = 16
# Neighbours in a node share each sequence: 32,768 of its tokens each, and in attention half of the
# heads.
sp = 2
seq_len = 64 * 1024
# 524,288 tokens per step = 1 micro-batch x 8 groups x 1 sequence x 65,536 tokens: FSDP gathers the
# weights once
batch_size = 8
micro_batch = 1

# 1.17 TB over sixteen GPUs: 73 GB each; one copy per node (replicas = 2) would need 146
optimizer = "split"
recompute = "attention"  # 108 GiB of 140 by the dry run

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50
