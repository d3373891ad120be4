# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on; the command prints them as one line and exits with code 2."""


class UserError(Exception):
    """``<what>: <requirement>, got <value>; <way out>``, in one line."""
