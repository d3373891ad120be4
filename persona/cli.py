# SPDX-License-Identifier: Apache-2.0
"""The command ``persona``: ``persona ti`` learns a token; errors are one line and exit code 2."""

import argparse
import sys
from collections.abc import Sequence

from persona.config import TextualInversionConfig, add_flags, from_flags
from persona.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="persona", description="Personalize a diffusion model.")
    commands = parser.add_subparsers(dest="command", required=True)
    ti = commands.add_parser(
        "ti",
        help="learn a new word from a few pictures, by forward passes only (ZOODiP)",
    )
    add_flags(ti, TextualInversionConfig)
    args = parser.parse_args(argv)
    # Heavy imports come after the flags, so that --help and typos answer at once.
    from persona.train import Interrupted, textual_inversion

    try:
        result = textual_inversion(from_flags(args, TextualInversionConfig))
    except UserError as error:
        print(f"persona: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"persona: {stop}", file=sys.stderr)
        return 130
    print(f"{result.embedding}: {result.steps} steps, {result.forwards} forwards")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
