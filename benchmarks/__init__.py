# SPDX-License-Identifier: Apache-2.0
"""One pytest-benchmark file a claim: `pytest benchmarks/bench_add_noise.py`."""
