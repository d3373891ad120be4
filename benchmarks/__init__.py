# SPDX-License-Identifier: Apache-2.0
"""One module a claim, run by `python -m benchmarks.NAME`; rows are kept in `results/`."""
