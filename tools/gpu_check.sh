#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Build, test and benchmark on a machine with a GPU and the Python packages of its own; called by make gpu-check.
# Everything is written under OUT; summary.txt says in a screen what passed and what was measured. Under 9 minutes.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
begun=$SECONDS failed=0
say() { echo "$(( SECONDS - begun )) s: $*" | tee -a "$OUT/summary.txt"; }
: > "$OUT/summary.txt"

python3 setup.py -q build_ext --inplace > "$OUT/build.log" 2>&1 || { failed=1; tail -5 "$OUT/build.log"; }
say "built"
python3 -m zo_kernels.info | tee "$OUT/info.txt"

# A kernel is compiled for each combination that a test asks for: several processes compile beside each other.
# A test that needs a package which this machine lacks (diffusers, say) skips with that reason.
tests() { # name, then arguments of pytest
  local name=$1; shift
  timeout 270 python3 -m pytest -q -p no:cacheprovider "$@" > "$OUT/tests-$name.log" 2>&1
  local code=$?
  echo "tests $name: $(tail -1 "$OUT/tests-$name.log")$([ $code = 124 ] && echo ' (stopped after 270 s)')" >> "$OUT/summary.txt"
  [ $code = 0 ] || return 1
}
waiting=()
start() { tests "$@" & waiting+=($!); }
start noise tests/ops/test_noise_contract.py tests/ops/test_add_noise.py tests/ops/test_noise_at_scale.py
start updates tests/ops/test_updates.py tests/ops/test_update_grids.py tests/ops/test_update_mathematics.py tests/ops/test_random_rounding.py
start rows tests/ops/test_quantize_rows.py tests/ops/test_group_norm.py
start attention tests/ops/test_row_norm.py tests/ops/test_qattention.py
start linear tests/ops/test_qlinear.py
start conv tests/ops/test_qconv2d.py
start perturbed-linear tests/ops/test_perturbed.py -k "test_linear or test_several"
start perturbed-conv tests/ops/test_perturbed.py -k "test_conv or test_channels"
start perturbed-sizes tests/ops/test_perturbed.py -k test_sizes
start perturbed-rest tests/ops/test_perturbed.py -k "not (test_linear or test_several or test_conv or test_channels or test_sizes)"
start triton tests/ops/test_triton_add_noise.py tests/ops/test_triton_updates.py tests/ops/test_triton_tables.py tests/ops/test_triton_tiles.py tests/ops/test_triton_quantized.py
start cuda tests/ops/test_cuda_cpp.py tests/ops/test_cuda_qlinear.py
if ls zo_kernels/_cuda.so > /dev/null 2>&1; then
  export ZO_CUDA_CPP=1
  start noise-by-cuda tests/ops/test_add_noise.py tests/ops/test_updates.py tests/ops/test_update_grids.py tests/ops/test_random_rounding.py tests/optim/test_graphed.py
  start linear-by-cuda tests/ops/test_qlinear.py
  unset ZO_CUDA_CPP
else
  say "CUDA C++ was not built: no nvcc, or a torch without CUDA"
fi
start cpp tests/ops/test_cpu_kernels.py tests/ops/test_registry.py tests/ops/test_quantized_gradients.py
start optim tests/optim tests/quant
for job in "${waiting[@]}"; do wait "$job" || failed=1; done
say "tested"
if ls zo_kernels/_cuda.so > /dev/null 2>&1 && command -v compute-sanitizer > /dev/null; then
  timeout 60 compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
    python3 -m pytest -q -p no:cacheprovider tests/ops/test_cuda_cpp.py tests/ops/test_cuda_qlinear.py -k on_a_gpu > "$OUT/sanitizer.log" 2>&1 || failed=1
  say "compute-sanitizer: $(grep -h 'ERROR SUMMARY' "$OUT/sanitizer.log" | tail -1)"
else
  say "compute-sanitizer: not run, it or the CUDA C++ kernels are missing"
fi

timeout 150 python3 -m benchmarks.gpu_ops --out "$OUT/gpu_ops.json" > "$OUT/gpu_ops.txt" 2>&1 || failed=1
tail -3 "$OUT/gpu_ops.txt"
say "measured ops: $(grep -c '|' "$OUT/gpu_ops.txt") rows"
for bench in gpu_noise gpu_steps noise_engine; do
  left=$(( 530 - (SECONDS - begun) ))
  if [ "$left" -gt 20 ]; then
    timeout "$left" python3 -m "benchmarks.$bench" --out "$OUT/$bench.json" > "$OUT/$bench.txt" 2>&1 || failed=1
    say "measured $bench"
  else
    say "no time for benchmarks.$bench"
  fi
done
grep -h -A17 "^qlinear\|^qconv2d\|^add_noise_" "$OUT/gpu_ops.txt" >> "$OUT/summary.txt"
[ ! -f "$OUT/gpu_noise.txt" ] || grep -h -A8 "^noise\|^updates\|^steps" "$OUT/gpu_noise.txt" >> "$OUT/summary.txt"
[ ! -f "$OUT/gpu_steps.txt" ] || cat "$OUT/gpu_steps.txt" >> "$OUT/summary.txt"
say "$([ $failed = 0 ] && echo 'all passed' || echo 'SOMETHING FAILED, see the logs')"
exit $failed
