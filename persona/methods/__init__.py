# SPDX-License-Identifier: Apache-2.0
"""Personalization methods, one file each."""
