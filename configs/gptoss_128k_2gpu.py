"""gpt-oss-20b, every parameter trained, on sequences of its full 131,072-token context, on two
141 GB GPUs.

torchrun --nproc_per_node 2 train.py configs/gptoss_128k_2gpu.py
"""

checkpoint = "checkpoints/gpt-oss-20b"
data = "data/corpus"

ranks = 2
sp = 2  # both share each sequence: 65,536 tokens and half of the heads each
seq_len = 128 * 1024
batch_size = 4  # 524,288 tokens per step = 4 micro-batches x 1 group x 1 sequence x 131,072 tokens
micro_batch = 1

# 10 bytes per parameter with an exact fp32 master: 105 GB each; 16 would be 167
optimizer = "split"
recompute = "attention"
offload = True  # from the second micro-batch on, gradients take memory too

steps = 200
lr, warmup_steps = 1e-5, 20
save_every = 50
