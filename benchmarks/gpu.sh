#!/usr/bin/env bash
# Every GPU benchmark on one GPU, in under nine minutes, with the packages found there; start it again to resume.
#
#     bash benchmarks/gpu.sh [SECONDS]           appends to benchmarks/{training,kernels,losses}_gpu.csv
#     EPOCHAL_TINY=/tmp/try bash benchmarks/gpu.sh       the same path on a CPU, under Triton's interpreter
#
# Rows already measured on this GPU with these versions are skipped, so a run that was cut short loses one row.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}
deadline=$((SECONDS + ${1:-520}))

bounded() {  # bounded <command...>: stop at the deadline, which is no failure: the next start goes on
    local left=$((deadline - SECONDS))
    if ((left < 10)); then echo "out of time before: $*"; exit 75; fi
    local code=0
    timeout --signal=TERM "$left" "$@" &
    trap 'kill "$!"; exit 75' TERM INT  # a job cut short must not go on measuring beside its successor
    wait "$!" || code=$?
    if ((code == 124)); then echo "out of time in: $*"; exit 75; fi
    if ((code != 0)); then failed=1; fi  # the other benchmarks are worth having
}
failed=0

if [[ -n ${EPOCHAL_TINY:-} ]]; then
    mkdir -p "$EPOCHAL_TINY"
    out=$(cd "$EPOCHAL_TINY" && pwd)
    export TRITON_INTERPRET=1 PYTHONWARNINGS="ignore::RuntimeWarning"  # numpy's, of infinities inside the interpreter
    bounded "$python" benchmarks/training.py --device cpu --model w16 --length 64 --step-tokens 256 --micro-batch 2 \
        --warmup 1 --steps 1 --csv "$out/training.csv"
    bounded "$python" benchmarks/kernels.py --tiny --csv "$out/kernels.csv"
    bounded "$python" benchmarks/losses.py --tokens 64 --vocabulary 100 --width 16 --csv "$out/losses.csv"
else
    bounded "$python" benchmarks/training.py
    bounded "$python" benchmarks/kernels.py --device cuda
    for tokens in 32768 4096; do
        bounded "$python" benchmarks/losses.py --device cuda --dtype bfloat16 --width 768 --tokens "$tokens" \
            --repeats 5 --csv losses_gpu.csv
    done
fi
if ((failed)); then echo "all benchmarks ended, some failed: see above"; exit 1; fi
echo "all benchmarks done"
