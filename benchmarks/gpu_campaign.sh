#!/usr/bin/env bash
# One slice of the `docs` campaign on one GPU, with the packages found there; start it again to resume.
#
#     bash benchmarks/gpu_campaign.sh                    eight minutes of all recipes
#     bash benchmarks/gpu_campaign.sh 5m ensembling      five minutes of one
#     SCALE=docs-rehearsal MODES= JOBS=2 bash benchmarks/gpu_campaign.sh 20m       the same path on a CPU
#
# Carry there: this repository and work/data/docs-4k, the token store that `epochal data docs-4k` makes where there is a network.
# Bring back: recipes/results/docs/records. Where the disk is kept, work/docs is too: an ensemble needs its members' weights,
# and trains those again that it does not find. Exit codes are those of `epochal run`: 0 all done, 75 time is up.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}"
limit=${1:-8m}
shift || true
modes=()
for mode in ${MODES-compile cuda-graph}; do modes+=(--mode "$mode"); done
# Small models leave a GPU waiting for its host: several workers share it, at the same time where MPS is installed.
if command -v nvidia-cuda-mps-control >/dev/null; then
    # It stays when this script ends: echo quit | nvidia-cuda-mps-control stops it.
    [[ -e ${CUDA_MPS_PIPE_DIRECTORY:-/tmp/nvidia-mps}/control ]] || nvidia-cuda-mps-control -d
fi
exec "${PYTHON:-python3}" -m epochal run "$@" --scale "${SCALE:-docs}" "${modes[@]}" --jobs "${JOBS:-4}" --time-limit "$limit" --tracker none
