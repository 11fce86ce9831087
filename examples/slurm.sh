#!/bin/bash
# Training on several nodes of a Slurm cluster: one torchrun per node, which starts a rank per GPU.
#
#     sbatch examples/slurm.sh configs/gptoss_120b.py --lr=1e-5
#
# The arguments are train.py's; options of sbatch before the script's name win over those below. All
# nodes share the file system that holds runs/, data/ and checkpoints/.
#
# Submit it as often as the run needs days. A job begins when the one before has left, and --resume
# continues; once the run has ended, the others say so and leave. Five minutes before the time limit
# Slurm sends SIGUSR1: the ranks finish their step, save and leave with exit code 0.

#SBATCH --job-name=nano-gpt-oss
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@300
#SBATCH --dependency=singleton
#SBATCH --requeue

set -euo pipefail
[ ! -f .venv/bin/activate ] || . .venv/bin/activate

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # one a line
launch=(
  torchrun
  --nnodes="$SLURM_JOB_NUM_NODES"
  --nproc_per_node="${SLURM_GPUS_ON_NODE:-8}"
  --rdzv_backend=c10d
  --rdzv_endpoint="${nodes%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))"
  --rdzv_id="$SLURM_JOB_ID"
)

# Slurm signals every process. SIGUSR1 would kill torchrun, and its ranks with it: it ignores the
# signal, which train.py asks for again in each rank.
srun --ntasks-per-node=1 --kill-on-bad-exit=1 \
  bash -c 'trap "" USR1; exec "$@"' bash "${launch[@]}" train.py "$@" --resume
