#!/usr/bin/env bash
# One command for a machine with a GPU: is it right, and how fast is it? In under 9 minutes.
#
#     benchmarks/gpu.sh [OUT]
#
# Writes JSON files and logs into OUT (default build/results/gpu). A step that cannot run, or runs out of its time,
# is named in OUT/gpu-steps.json, and the others run. PYTHON is the interpreter (default: .venv's, else python3); peers
# that are not installed are named by benchmarks.offline.
set -u
cd "$(dirname "$0")/.."
out=${1:-build/results/gpu}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
case $out in -*)
    sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
esac
"$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{error}: make setup first")
sys.exit(None if torch.cuda.is_available() else "no GPU that torch can use is here")' || exit 1
deadline=$((SECONDS + 525))
steps=()
mkdir -p "$out"

# step NAME SECONDS COMMAND…: run it, for so long at most, and note how it ended.
step() {
    local name=$1 limit=$2 started=$SECONDS left=$((deadline - SECONDS)) code
    shift 2
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        code=null
        echo "== $name: no time left"
    else
        echo "== $name: $*"
        timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
        code=$?
        tail -n 40 "$out/$name.log"
        echo "== $name: exit status $code after $((SECONDS - started)) s"
    fi
    steps+=("{\"step\": \"$name\", \"command\": \"$*\", \"exit_status\": $code, \"seconds\": $((SECONDS - started)), \"limit_s\": $limit}")
    (IFS=,; echo "[${steps[*]}]") >"$out/gpu-steps.json"
}

offline() {
    local name=$1 limit=$2
    shift 2
    step "$name" "$limit" "$python" -m benchmarks.offline --dtype bf16 --device cuda --max_step_tokens 2048 \
        --out "$out/$name.json" "$@"
}

# What the GPU computes: the tests that need one, and those of its kernels, which run on it where there is one.
step tests 120 "$python" -m pytest -q -m gpu --continue-on-collection-errors tests/llama2
step kernel-tests 60 "$python" -m pytest -q tests/llama2/kernels/test_cuda.py
step kernels 60 "$python" -m benchmarks.gpu_kernels --out "$out/gpu-kernels.json"
offline 7b 90 --shape 7b --batches 1,8,64 --contexts 128,1024 --rounds 2
offline 7b-long 60 --shape 7b --batches 1 --contexts 2048,4096 --rounds 2
# By now every kernel is compiled: this whole step is an upper bound for the start of a server.
offline 7b-start 60 --shape 7b --batches 1 --contexts 128 --new_tokens 1 --rounds 1
offline 13b 60 --shape 13b --batches 1 --contexts 128 --rounds 2
offline 7b-peers 150 --shape 7b --batches 1 --contexts 128 --rounds 2 --peer transformers_static,gpt_fast
offline 7b-no-graphs 45 --shape 7b --batches 1 --contexts 128 --rounds 1 --cuda_graphs False
