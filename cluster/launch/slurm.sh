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

fail() { echo "slurm.sh: $*" >&2; exit 1; }
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "expected SLURM_JOB_NODELIST: submit this script with sbatch"
export PATH="$PWD/.venv/bin:$PATH" NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
python -c 'from importlib.util import find_spec as f; exit(not (f("ray") and f("rluf")))' ||
  fail "python in $PWD finds no ray and rluf: submit from the checkout, after make setup EXTRA=gpu"

# Absolute, since actors run in other folders.
RLUF_RUNS="$(realpath -m "${RLUF_RUNS:-runs}")" RLUF_CACHE="$(realpath -m "${RLUF_CACHE:-cache}")"
HF_HOME="$(realpath -m "${HF_HOME:-$RLUF_CACHE/hf}")"
RAY_AUTH_TOKEN_PATH="$(realpath -m "${RAY_AUTH_TOKEN_PATH:-$RLUF_RUNS/.ray-auth-token}")"
export RLUF_RUNS RLUF_CACHE HF_HOME RAY_AUTH_TOKEN_PATH RAY_AUTH_MODE=token
umask 077
mkdir -p "$RLUF_RUNS" "$RLUF_CACHE"
# Compilers and vLLM write to the home folder, which compute nodes often cannot.
[ -w "${HOME:-/nonexistent}" ] || { export HOME="$RLUF_CACHE/home"; mkdir -p "$HOME"; }

# Ray's token, in a file that every node can read and other users cannot. It never appears on a command line. The file
# gets its name when it is complete, since another job may create it now.
if [ ! -e "$RAY_AUTH_TOKEN_PATH" ]; then
  new_token="$(mktemp "$RAY_AUTH_TOKEN_PATH.XXXXXX")"
  python -c 'import secrets; print(secrets.token_hex(32))' > "$new_token"
  mv -n "$new_token" "$RAY_AUTH_TOKEN_PATH"
  rm -f "$new_token"
fi
[ -s "$RAY_AUTH_TOKEN_PATH" ] && [ -r "$RAY_AUTH_TOKEN_PATH" ] ||
  fail "$RAY_AUTH_TOKEN_PATH has no token that you can read: delete it, or set RAY_AUTH_TOKEN_PATH to a file of yours"

# srun inherits --export=NONE, which would hide the token, and --gpus, the total over all nodes.
unset SLURM_EXPORT_ENV SLURM_GPUS
# The nodes of the job; those of every component where it is heterogeneous (sbatch ... : ...). A node of two components
# gets one Ray.
hosts=() groups=() cpus=()
for ((group = 0; group < ${SLURM_HET_SIZE:-1}; group++)); do
  nodelist="SLURM_JOB_NODELIST_HET_GROUP_$group" group_cpus="SLURM_CPUS_PER_TASK_HET_GROUP_$group"
  hostnames="$(scontrol show hostnames "${!nodelist:-$SLURM_JOB_NODELIST}")"
  while read -r host; do
    [[ " ${hosts[*]-} " == *" $host "* ]] && continue
    hosts+=("$host") groups+=("$group") cpus+=("${!group_cpus:-${SLURM_CPUS_PER_TASK:-$(nproc)}}")
  done <<< "$hostnames"
done
head="${hosts[0]}"
# Run a command on a node by its position. srun does not inherit the CPUs from sbatch: Ray would run on one core.
on_node() {
  local position=$1 component=()
  shift
  [ "${SLURM_HET_SIZE:-1}" -eq 1 ] || component=("--het-group=${groups[position]}")
  SRUN_CPUS_PER_TASK="${cpus[position]}" srun --nodes=1 --ntasks=1 "${component[@]}" \
    --nodelist="${hosts[position]}" "$@"
}
# The address of the interface with the default route: a host name often resolves to 127.0.1.1 on the host itself.
addresses="$(on_node 0 ip -4 -o route get 192.0.2.1 | grep -oP 'src \K\S+' || on_node 0 hostname -I)"
# IPv4 where there is one: NCCL's rendezvous in vLLM has no other.
ip="$(tr ' ' '\n' <<< "$addresses" | grep -m1 -F . || tr ' ' '\n' <<< "$addresses" | grep -m1 -F :)" ||
  fail "node $head has no address that other nodes could reach"
# Ports of this job, since other jobs may run on these nodes: below those that Linux gives to connections.
port=$((20000 + ${SLURM_JOB_ID:-0} % 4000 * 3))
address="$ip:$port"
[[ "$ip" != *:* ]] || address="[$ip]:$port"
on_node 0 nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || true

# Ray counts the GPUs of each node itself.
on_node 0 ray start --head --block --node-ip-address="$ip" --port="$port" --num-cpus="${cpus[0]}" \
  --ray-client-server-port="$((port + 1))" --dashboard-host=127.0.0.1 --dashboard-port="$((port + 2))" &
ray_head=$!
until RAY_ADDRESS="$address" ray status > /dev/null 2>&1; do
  kill -0 "$ray_head" 2> /dev/null || fail "Ray's head on $head has ended; see its messages above"
  [ "$SECONDS" -lt 300 ] || fail "Ray's head on $head does not answer at $address after 5 minutes"
  sleep 2
done
echo "slurm.sh: Ray's head is $head ($address), its dashboard http://127.0.0.1:$((port + 2)) there"
for ((position = 1; position < ${#hosts[@]}; position++)); do
  on_node "$position" ray start --block --address="$address" --num-cpus="${cpus[position]}" &
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
