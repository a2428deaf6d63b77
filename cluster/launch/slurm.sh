#!/usr/bin/env bash
# A run on Slurm: sbatch cluster/launch/slurm.sh --config configs/llama3-70b-64gpu.yaml
# Submit from a checkout whose .venv lies on storage that every node can read. Further arguments go to rluf.train.
#SBATCH --job-name=rluf
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=runs/slurm-%j.txt
set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH" RLUF_RUNS="${RLUF_RUNS:-$PWD/runs}" RLUF_CACHE="${RLUF_CACHE:-$PWD/cache}"
export RAY_AUTH_MODE=token
# Ray's token: the first `ray start` creates it in ~/.ray, which the nodes of a Slurm cluster usually share. Otherwise
# set RAY_AUTH_TOKEN_PATH. The token never appears on a command line.

gpus="${SLURM_GPUS_ON_NODE:-8}" cpus="${SLURM_CPUS_PER_TASK:-96}"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${hosts[0]}"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):6379"

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --port="${address##*:}" --dashboard-host=127.0.0.1 --num-cpus="$cpus" --num-gpus="$gpus" &
for _ in $(seq 60); do
  RAY_ADDRESS="$address" ray status > /dev/null 2>&1 && break
  sleep 2
done
for host in "${hosts[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$host" \
    ray start --block --address="$address" --num-cpus="$cpus" --num-gpus="$gpus" &
done

# Slurm sends TERM five minutes before the end or on preemption: the run saves a checkpoint, a requeued job resumes.
RAY_ADDRESS="$address" python -m rluf.train "$@" --resume &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do wait "$run" || code=$?; done
exit "$code"
