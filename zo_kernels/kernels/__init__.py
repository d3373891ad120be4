# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, one file an op, of the same name."""
