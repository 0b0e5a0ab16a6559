#!/usr/bin/env bash
# Prove and time everything on a machine with a GPU, in one call of under 10 minutes; needs torch, triton,
# numpy, jaxtyping and lightning-fabric.
#
#     benchmarks/gpu.sh [--minutes 9] [--only PART ...] [--json FILE]
#
# Prints one table and writes benchmarks/results/gpu/<card>.json.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=src PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
unset TRITON_INTERPRET
exec "${PYTHON:-python3}" benchmarks/gpu.py "$@"
