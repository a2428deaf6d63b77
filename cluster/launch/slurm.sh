#!/usr/bin/env bash
# A run on Slurm: sbatch cluster/launch/slurm.sh --config configs/llama3-70b-64gpu.yaml
# Submit from a checkout (make setup EXTRA=gpu) on storage that every node can read and write: .venv, runs, cache and
# models lie there. Needs NVIDIA driver R580 or later (CUDA 13). Further arguments go to rluf.train.
#SBATCH --job-name=rluf
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%j.txt
set -euo pipefail

export PATH="$PWD/.venv/bin:$PATH" RLUF_RUNS="${RLUF_RUNS:-$PWD/runs}" RLUF_CACHE="${RLUF_CACHE:-$PWD/cache}"
export HF_HOME="${HF_HOME:-$RLUF_CACHE/hf}" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# Ray's token, in a file that every node can read and other users cannot. It never appears on a command line.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="${RAY_AUTH_TOKEN_PATH:-$RLUF_RUNS/.ray-auth-token}"
umask 077
mkdir -p "$RLUF_RUNS" "$RLUF_CACHE"
[ -s "$RAY_AUTH_TOKEN_PATH" ] || python -c 'import secrets; print(secrets.token_hex(32))' > "$RAY_AUTH_TOKEN_PATH"

gpus="${SLURM_GPUS_ON_NODE:-8}" cpus="${SLURM_CPUS_PER_TASK:-96}"
export SRUN_CPUS_PER_TASK="$cpus" # srun does not inherit it from sbatch: Ray would run on one core
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${hosts[0]}"
# The address of the interface with the default route: a host name often resolves to 127.0.1.1 on the host itself.
ip="$(srun --nodes=1 --ntasks=1 --nodelist="$head" ip -4 -o route get 192.0.2.1 | grep -oP 'src \K\S+')"
address="$ip:6379"
srun --nodes=1 --ntasks=1 --nodelist="$head" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true

srun --nodes=1 --ntasks=1 --nodelist="$head" ray start --head --block --node-ip-address="$ip" \
  --port="${address##*:}" --dashboard-host=127.0.0.1 --num-cpus="$cpus" --num-gpus="$gpus" &
for _ in $(seq 60); do
  RAY_ADDRESS="$address" ray status > /dev/null 2>&1 && break
  sleep 2
done
for host in "${hosts[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$host" \
    ray start --block --address="$address" --num-cpus="$cpus" --num-gpus="$gpus" &
done

# The run waits for the other nodes (timeouts.autoscale_s). Slurm sends TERM five minutes before the end or on
# preemption: the run saves a checkpoint, a requeued job resumes.
RAY_ADDRESS="$address" python -m rluf.train "$@" --resume &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do wait "$run" || code=$?; done
exit "$code"
