# SPDX-License-Identifier: Apache-2.0
"""Keeps what diffusers and transformers tell their own users away from ours."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

LIBRARIES = (diffusers_logging, transformers_logging)


@contextmanager
def errors_only() -> Iterator[None]:
    """Within the block, both log errors only: for imports, which warn of packages not needed."""
    before = [library.get_verbosity() for library in LIBRARIES]
    try:
        for library in LIBRARIES:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(LIBRARIES, before, strict=True):
            library.set_verbosity(verbosity)


@contextmanager
def no_bars() -> Iterator[None]:
    """Within the block, neither shows a progress bar; warnings, as of missing weights, stay."""
    shown = [library for library in LIBRARIES if library.is_progress_bar_enabled()]
    try:
        for library in shown:
            library.disable_progress_bar()
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
