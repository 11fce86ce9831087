"""gpt-oss-20b, every parameter trained, on sequences of a million tokens, on eight 80 GB GPUs.

python train.py configs/gptoss_1m.py --rehearse=true    # one of the eight, on one GPU, no download
torchrun --nproc_per_node 8 train.py configs/gptoss_1m.py
"""

checkpoint = "checkpoints/gpt-oss-20b"
data = "data/corpus"
max_position_embeddings = 1024 * 1024  # YaRN was tuned for 131,072: what is beyond has to be learnt

ranks = 8
sp = 8  # all share each sequence: 131,072 of its tokens, and in attention an eighth of the heads
seq_len = 1024 * 1024
batch_size = 1  # 1,048,576 tokens a step = 1 micro-batch x 1 group x 1 sequence
micro_batch = 1

optimizer = "fp32"  # 335 GB over eight GPUs: 42 GB each
recompute = "attention"  # 70 GiB of 79; attention is 93 % of the FLOPs of a forward
offload = True  # 25 inputs of 0.7 GiB: 18 GiB of host memory for each GPU

steps = 100
lr, warmup_steps = 1e-5, 10
save_every = 10
