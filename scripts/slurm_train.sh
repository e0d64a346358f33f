#!/bin/bash
# An example for Slurm: 2 nodes of 8 GPUs, one torchrun a node. Not run by this project; fit partition, times and
# modules to your cluster.
#   sbatch scripts/slurm_train.sh recipes/8b-8gpu-1-restore.yaml [OVERLAY.yaml ...] [key=value ...]
# Started again or requeued, it goes on from the newest complete checkpoint.
#SBATCH --job-name=gmsa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gmsa-%j.log
set -euo pipefail

# The recipe's output must lie on a file system that all nodes share, and so should the backbones (HF_HOME).
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=8

srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node 8 \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$head_node:29500" \
    -m gmsa train "$@" --resume

# With FSDP2 in place of DDP; every node needs its own rank, so srun starts a shell that knows it:
# export head_node
# srun bash -c 'accelerate launch --config_file recipes/accelerate/fsdp2.yaml \
#     --num_machines "$SLURM_NNODES" --num_processes "$((8 * SLURM_NNODES))" --machine_rank "$SLURM_NODEID" \
#     --main_process_ip "$head_node" --main_process_port 29500 -m gmsa train "$@" --resume' gmsa "$@"
