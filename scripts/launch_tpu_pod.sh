#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice: the same command on every worker, watched over, in tmux.
set -euo pipefail

usage() {
  cat <<'USAGE'
Usage: scripts/launch_tpu_pod.sh COMMAND TPU [ARGUMENTS]

  setup  TPU            copies the last commit to every worker and installs what it needs
  start  TPU FLAGS...   runs main.py with these flags on every worker where it does not run yet
  status TPU            names the workers where it does not run or that cannot be reached
  logs   TPU [WORKER]   follows the output of one worker; default: 0
  stop   TPU            saves a checkpoint on every worker and ends; `start` then continues

Zone and project are those of `gcloud config`, or of the environment variables
CLOUDSDK_COMPUTE_ZONE and CLOUDSDK_CORE_PROJECT. On a worker, the code is in ~/sret_jax, and the
output, the process and the last exit status in ~/.sret_jax; `tmux attach -t sret_jax` shows it live.

  scripts/launch_tpu_pod.sh setup my-pod
  scripts/launch_tpu_pod.sh start my-pod --config=configs/sret_s.py --workdir=gs://BUCKET/RUN
USAGE
}

fail() {
  echo "Error: $1" >&2
  exit 2
}

# The functions worker_* run on the workers. What they say begins with MARK: a worker that says
# nothing was not reached.
readonly MARK="sret_jax:"

worker_setup() {
  set -e
  mkdir -p ~/sret_jax
  tar -xzf ~/sret_jax.tar.gz -C ~/sret_jax
  cd ~/sret_jax
  command -v tmux >/dev/null || sudo apt-get install -y tmux
  [[ -x ~/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
  ~/.local/bin/uv venv --quiet --allow-existing --python 3.12 .venv
  ~/.local/bin/uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt
  echo "$MARK ready"
}

worker_start() {
  if [[ ! -x ~/sret_jax/.venv/bin/python ]]; then
    echo "$MARK not set up; run the command setup first"
  elif tmux has-session -t =sret_jax 2>/dev/null; then
    echo "$MARK runs already"
  else
    mkdir -p ~/.sret_jax
    rm -f ~/.sret_jax/status
    tmux new-session -d -s sret_jax bash -c "$(declare -f worker_run); worker_run \"\$@\"" run "$@"
    echo "$MARK started"
  fi
}

worker_run() {
  cd ~/sret_jax || return
  trap "" INT # Ctrl-C is for the launcher, which takes it although it is ignored here
  .venv/bin/python -m sret_jax.tools.launch --restarts=10 main.py "$@" >> ~/.sret_jax/log 2>&1 &
  echo $! > ~/.sret_jax/pid
  tail --pid=$! -n 50 -f ~/.sret_jax/log
  wait $!
  echo $? > ~/.sret_jax/status
}

worker_status() {
  if tmux has-session -t =sret_jax 2>/dev/null; then
    echo "$MARK runs"
  elif [[ -s ~/.sret_jax/status ]]; then
    echo "$MARK does not run; it ended with exit status $(< ~/.sret_jax/status)"
  elif [[ -e ~/.sret_jax/pid ]]; then
    echo "$MARK does not run; it was cut off, as by a restart of the machine"
  else
    echo "$MARK does not run; it was never started"
  fi
}

worker_stop() {
  if tmux has-session -t =sret_jax 2>/dev/null; then
    kill -TERM "$(< ~/.sret_jax/pid)"
    while tmux has-session -t =sret_jax 2>/dev/null; do sleep 0.2; done
  fi
  worker_status
}

# Prints a shell command that calls a worker function with arguments, whatever they contain.
remote() {
  local functions
  functions="$(declare -p MARK); $(declare -f worker_setup worker_start worker_run worker_status \
    worker_stop)"
  printf '%q ' bash -c "$functions; \"\$@\"" sret_jax "$@"
}

# Calls a worker function on every worker and prints who answered what; fails unless all answers
# match the pattern $1. What worker N printed is in $answers/N.log.
everywhere() {
  local expected="$1" worker=0 log answer good=0
  shift
  gcloud compute tpus tpu-vm ssh "$tpu" --worker=all --output-directory="$answers" \
    --command="$(remote "$@")" || true # the answers say more than its exit status
  while log="$answers/$worker.log" && [[ -e "$log" ]]; do
    answer="$(sed -n "s/^$MARK //p" "$log" | tail -n 1)"
    [[ ! "$answer" =~ $expected ]] || good=$((good + 1))
    [[ -n "$answer" ]] || answer="cannot be reached, or failed: $(tail -n 1 "$log")"
    printf '%s\t%s\n' "$answer" "$worker" >> "$answers/all"
    worker=$((worker + 1))
  done
  [[ "$worker" -gt 0 ]] || fail "no worker of '$tpu' could be asked"
  awk -F '\t' '{ who[$1] = who[$1] " " $2 } END { for (a in who) print "worker" who[a] ": " a }' \
    "$answers/all" | sort -k 2n
  [[ "$good" == "$worker" ]]
}

copy() {
  git diff --quiet HEAD || echo "Changes that are not committed are not copied." >&2
  git archive --format=tar.gz --output="$answers/sret_jax.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$answers/sret_jax.tar.gz" "$tpu:sret_jax.tar.gz" --worker=all
}

main() {
  [[ "${1:-}" != --help && "${1:-}" != -h ]] || { usage; exit; }
  [[ $# -ge 2 ]] || { usage >&2; exit 2; }
  local command="$1"
  readonly tpu="$2"
  shift 2
  answers="$(mktemp -d)"
  trap 'rm -rf "$answers"' EXIT
  case "$command" in
    setup) copy && everywhere '^ready$' worker_setup ;;
    start) everywhere '^(started|runs already)$' worker_start "$@" ;;
    status) everywhere '^runs$' worker_status ;;
    stop) everywhere '^does not run' worker_stop ;;
    logs)
      gcloud compute tpus tpu-vm ssh "$tpu" --worker="${1:-0}" \
        --command="tail -n 50 -F ~/.sret_jax/log"
      ;;
    *) fail "there is no command '$command'; give setup, start, status, logs or stop" ;;
  esac
}

main "$@"
