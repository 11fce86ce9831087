"""A real GPT-OSS, small enough for a laptop: 1.9 M parameters learn the language reference that
ships inside every Python.

torchrun --nproc_per_node 2 train.py configs/tiny.py
"""

data, eval_data = "pydoc", "pydoc-val"
vocab_size = 257  # 256 bytes and an end-of-document token

num_hidden_layers = 4
hidden_size = 128
num_attention_heads, num_key_value_heads, head_dim = 4, 2, 32
num_experts, experts_per_token, intermediate_size = 8, 2, 128
sliding_window = 32
initial_context_length = 256
rope_scaling_factor = 4.0
max_position_embeddings = 1024

ranks = sp = 2  # both ranks share every sequence
seq_len = 256
batch_size = micro_batch = 16  # 4,096 tokens per step
recompute = "none"

steps = 180
lr, warmup_steps, weight_decay = 3e-3, 20, 0.1
eval_every = 60
log_every = 20
sample = "The import statement"
