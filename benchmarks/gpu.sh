#!/usr/bin/env bash
# One command for a machine with a GPU: is it right, and how fast is it? In nine minutes at most.
#
#     benchmarks/gpu.sh [OUT]
#
# Writes gpu.json, gpu.txt and a log of each step into OUT (default build/results/gpu), and all of that as OUT.tar.gz.
# Needs torch, triton and numpy alone; what else is missing is named, and what needs it left out. PYTHON is the
# interpreter (default: .venv's, else python3). The steps and their limits are in benchmarks/gpu_steps.py.
set -u
case ${1:-} in -*)
    sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
    ;;
esac
out=$(realpath -m "${1:-$(dirname "$0")/../build/results/gpu}")
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
"$python" -c '
import sys
try:
    import torch
except ImportError as error:
    sys.exit(f"{error}: make setup first, or let PYTHON be an interpreter that has torch, triton and numpy")
if not torch.cuda.is_available():
    sys.exit("no GPU that torch can use is here")
try:
    import numpy, triton
except ImportError as error:
    sys.exit(f"{error}: install it into the environment of {sys.executable}")' || exit 1
exec "$python" -m benchmarks.gpu_steps "$out"
