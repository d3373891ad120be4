# SPDX-License-Identifier: Apache-2.0
"""The command ``persona``: ``persona ti`` learns a token; errors are one line and exit code 2."""

import argparse
import dataclasses
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

from persona.config import TextualInversionConfig, add_flags, flags, from_flags
from persona.errors import UserError


class _Parser(argparse.ArgumentParser):
    """Answers a typo in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"persona: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    parser = _Parser(prog="persona", description="Personalize a diffusion model.")
    commands = parser.add_subparsers(dest="command", required=True)
    ti = commands.add_parser(
        "ti",
        help="learn a new word from a few pictures, by forward passes only (ZOODiP)",
        allow_abbrev=False,  # what starts like one of the options is a typo as well
    )
    add_flags(ti, TextualInversionConfig)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        ti.error(_unknown(unknown[0]))
    # Heavy imports come after the flags, so that --help and typos answer at once.
    from persona.train import textual_inversion

    try:
        result = textual_inversion(from_flags(args, TextualInversionConfig))
    except UserError as error:
        print(f"persona: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = str(stop) or "stopped; a checkpoint that was written stays"
        print(f"persona: {told}", file=sys.stderr)
        return 130
    print(f"{result.embedding}: {result.steps} steps, {result.forwards} forwards")
    if result.rejected:
        print(f"{result.rejected} steps changed nothing: their loss was not finite")
    return 0


def _unknown(word: str) -> str:
    known = [flag for item in dataclasses.fields(TextualInversionConfig) for flag in flags(item)]
    near = difflib.get_close_matches(word.split("=")[0], known, 1)
    hint = f"; did you mean {near[0]}" if near else ""
    return f"{word}: must be an option of the command, got one it does not know{hint}"


if __name__ == "__main__":
    raise SystemExit(main())
