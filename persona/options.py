# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses whose fields are a command's flags, with what each of them allows."""

import argparse
import dataclasses
import math
import re
from dataclasses import field
from typing import Any

from persona.errors import UserError


def option(
    default: Any,
    help: str,
    *aliases: str,
    choices: tuple[str, ...] | None = None,
    at_least: float | None = None,
    below: float | None = None,
    positive: bool = False,
    may_change: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    Args:
        default: of field and flag; a bool must be False, its flag makes it True.
        help: one line.
        aliases: other tools' names for it.
        choices, at_least, below, positive (and finite): what `check` refuses otherwise.
        may_change: a resumed run need not share it.
    """
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "choices": choices,
            "at_least": at_least,
            "below": below,
            "positive": positive,
            "may_change": may_change,
        },
    )


def check(config: Any) -> None:
    """Hold every field of a dataclass of options to what its `option` says.

    Raises:
        UserError: a value is out of range or not one of the choices.
    """
    for item in dataclasses.fields(config):
        value, allowed = getattr(config, item.name), item.metadata
        low, top, choices = (allowed[key] for key in ("at_least", "below", "choices"))
        wanted = ""
        if low is not None and not value >= low:
            wanted = f"at least {low}"
        elif top is not None and not value < top:
            wanted = f"below {top}"
        elif allowed["positive"] and not 0 < value < math.inf:
            wanted = "positive and finite"
        elif choices and value not in choices:
            wanted, value = f"one of {', '.join(choices)}", repr(value)
        if wanted:
            raise UserError(f"{item.name}: must be {wanted}, got {value}; see --help")


def parse_size(name: str, text: str) -> int:
    """Bytes of "1.5GB" (10^9), "900MiB" (2^20) and the like.

    Raises:
        UserError: it is no such size; ``name`` is whose.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?) ?(?:([kmg])(i?))?b", text.strip(), re.IGNORECASE)
    if not found:
        raise UserError(f"{name}: must be a size such as 1.5GB or 900MiB, got {text!r}; see --help")
    number, prefix, binary = found.groups()
    power = "kmg".index(prefix.lower()) + 1 if prefix else 0
    return int(float(number) * (1024 if binary else 1000) ** power)


def flags(item: dataclasses.Field) -> list[str]:
    """``["--max_train_steps"]``: the flag of a field, then other tools' names for it."""
    return [f"--{name}" for name in (item.name, *item.metadata["aliases"])]


def add_flags(parser: argparse.ArgumentParser, config: type) -> None:
    """One flag a field of the dataclass ``config``; other tools' names for it are accepted too."""
    for item in dataclasses.fields(config):
        names = flags(item)
        text = item.metadata["help"].replace("%", "%%") + " (default: %(default)r)"
        if item.type is bool:
            parser.add_argument(*names, action="store_true", help=text)
        else:
            parser.add_argument(
                *names,
                dest=item.name,
                type=item.type,
                default=item.default,
                choices=item.metadata["choices"],
                help=text,
            )


def from_flags(args: argparse.Namespace, config: type) -> Any:
    """The dataclass ``config`` from parsed flags."""
    return config(**{item.name: getattr(args, item.name) for item in dataclasses.fields(config)})
