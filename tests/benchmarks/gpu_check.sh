#!/usr/bin/env bash
# Test and measure the harness on a GPU, in one call of under 9 minutes, with a table at the end:
#
#   tests/benchmarks/gpu_check.sh TREE [--photographs TREE] [--seconds 530] [--only STEP,...]
#
# TREE holds CIFAR-10 as images (train/CLASS/*, test/CLASS/*). Runs, logs and table go to $OUT (/tmp/gpu_check). gpu_check.py
# says what is measured, and how.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1
exec python3 -m tests.benchmarks.gpu_check "$@"
