#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, test and benchmark on a machine with a GPU and the Python packages of its own; called by make gpu-check.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
python3 setup.py -q build_ext --inplace 2>&1 | tee "$OUT/build.log" | tail -3
python3 -m zo_kernels.info | tee "$OUT/info.txt"
# A test that needs a package which this machine lacks (diffusers, say) skips with that reason.
python3 -m pytest -q -p no:cacheprovider tests/ops tests/optim tests/quant 2>&1 | tee "$OUT/tests.log" | tail -15
python3 -m benchmarks.noise_engine --out "$OUT/noise_engine.json" 2>&1 | tee "$OUT/noise_engine.txt"
