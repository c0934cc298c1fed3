#!/usr/bin/env bash
# Makes .venv from the Python given as $1 and installs dsft into it; every step that takes longer than two seconds has a
# progress line with its elapsed seconds. What pip and the compilers say goes to .venv/install.log and is shown on failure.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
log=.venv/install.log
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 PIP_PROGRESS_BAR=off

# step LABEL COMMAND...: run a command behind a progress line; on failure show the end of what it said, and stop.
step() {
  local label=$1 start=$SECONDS pid status=0
  shift
  "$@" >>"$log" 2>&1 &
  pid=$!
  trap 'kill $pid 2>/dev/null' EXIT
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    if [ -t 1 ]; then
      printf '\r\033[K  %s … %d s  %s' "$label" $((SECONDS - start)) "$(tail -n 1 "$log" | tr -d '\r' | cut -c 1-50)"
    elif [ $((SECONDS - start)) -ge "${next:=15}" ]; then
      printf '  %s … %d s\n' "$label" $((SECONDS - start))
      next=$((next + 15))
    fi
  done
  wait "$pid" || status=$?
  trap - EXIT
  next=15
  if [ -t 1 ]; then printf '\r\033[K'; fi
  printf '  %s: %d s\n' "$label" $((SECONDS - start))
  if [ "$status" -ne 0 ]; then
    printf '\n%s failed (exit code %d). The end of %s:\n\n' "$label" "$status" "$log" >&2
    grep -v '^WARNING\|^building ' "$log" | tail -n 40 >&2
    exit 1
  fi
}

if ! "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "$python is not a Python of version 3.10 or newer with the venv module (Debian: apt-get install python3-venv);" \
    "name another one: make install PYTHON=/path/to/python" >&2
  exit 1
fi
if ! command -v "${CXX:-c++}" >/dev/null; then
  echo "no C++ compiler ${CXX:-c++}: the CPU optimizer and dsft's operations are built here (Debian: apt-get install g++)" >&2
  exit 1
fi

echo "Installing dsft into .venv (the first time, torch alone is some hundred MB)"
mkdir -p .venv
: >"$log"
step "making .venv" "$python" -m venv .venv
step "installing dsft and its libraries" .venv/bin/python -m pip install -c constraints.txt -e '.[dev,eval,lm-eval,tensorboard,wandb,mlflow]'
step "building dsft's operations" .venv/bin/dsft ops build
if command -v nvidia-smi >/dev/null; then
  step "building DeepSpeed's operations" .venv/bin/python -m dsft.launch.native_ops --cuda
else
  step "building DeepSpeed's operations" .venv/bin/python -m dsft.launch.native_ops
fi
