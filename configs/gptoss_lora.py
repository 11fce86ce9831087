"""gpt-oss-20b on one GPU from 24 GB up: low-rank adapters on attention, sequences of 16,384 tokens,
the released weights kept packed in MXFP4 as they are.

python convert_hf.py openai/gpt-oss-20b --packed   # 14 GB of disk
python data.py corpus.jsonl --out data/corpus
python train.py configs/gptoss_lora.py             # one GPU needs no torchrun
python sample.py runs/gptoss_lora "Why is the sky blue?"
python convert_hf.py --export runs/gptoss_lora --out my-model              # merged, in bf16
python convert_hf.py --export runs/gptoss_lora --out my-adapters --adapter # for PEFT
"""

checkpoint = "checkpoints/gpt-oss-20b-packed"
data = "data/corpus"

lora_rank, lora_targets = 16, "attention"
frozen = "mxfp4"  # 12.8 GiB; in bf16 the weights alone would be 39

seq_len = 16 * 1024
batch_size, micro_batch = 4, 1  # 65,536 tokens per step = 4 micro-batches x 16,384 tokens
recompute = "all"  # a peak of 18.3 GiB, measured on an H100

# By the dry run, a 24 GB card, 64K or 128K tokens: offload = True (18 and 22 GiB).
# By the dry run, a 16 GB card: seq_len = 4096 and offload = True (14 GiB).
# An 80 GB card, 32K tokens, faster and with adapters on the experts too: lora_rank = 8,
#     lora_targets = "attention,experts", recompute = "attention", keep_blocks = 8 (measured:
#     46.8 GiB).
# Two or more GPUs: torchrun --nproc_per_node 2 train.py configs/gptoss_lora.py --sp=2

steps = 200
lr, warmup_steps = 2e-4, 10
save_every = 50
