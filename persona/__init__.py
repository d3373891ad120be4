# SPDX-License-Identifier: Apache-2.0
"""Personalize a diffusers pipeline from a few pictures, in the memory that inference needs."""
