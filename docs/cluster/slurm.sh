#!/bin/bash
#SBATCH --job-name=swav
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append

OUT=runs/photos
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
RESUME=()
if [ -e "$OUT/last.pth" ]; then RESUME=(--resume); fi
export OMP_NUM_THREADS=2

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=8 --max-restarts=3 --shutdown-timeout=120 \
    --rdzv-backend=c10d --rdzv-endpoint="$HOST:29500" --rdzv-id="$SLURM_JOB_ID" \
    -m self_supervised_swav pretrain photos --out "$OUT" --bs 4096 --num-workers 7 "${RESUME[@]}" &
STEP=$!

stopped() {
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$STEP"
    scontrol requeue "$SLURM_JOB_ID"
}
trap stopped TERM
wait "$STEP"
