# SPDX-License-Identifier: Apache-2.0
"""The command ``persona``: a subcommand a method, and ``plan`` before it for the memory of its run;
errors are one line and exit code 2."""

import argparse
import dataclasses
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from persona.config import RunConfig, TextualInversionConfig
from persona.config_dreambooth import DreamBoothConfig
from persona.config_scales import ScaleTuningConfig
from persona.config_selective import SelectiveConfig
from persona.errors import UserError
from persona.options import add_flags, flags, from_flags


class Command(NamedTuple):
    """A subcommand: its flags are the fields of ``config``, the class ``method`` runs it."""

    config: type[RunConfig]
    method: str  # module:class, imported after the flags: --help and typos answer at once
    help: str


COMMANDS = {
    command.config.command: command
    for command in (
        Command(
            TextualInversionConfig,
            "persona.methods.textual_inversion:TextualInversion",
            "learn a new word from a few pictures, by forward passes only (Gauss-Newton, ZOODiP)",
        ),
        Command(
            ScaleTuningConfig,
            "persona.methods.scale_tuning:ScaleTuning",
            "train the scales of the integer weights (PEQA, S1, S2, TuneQDM)",
        ),
        Command(
            DreamBoothConfig,
            "persona.methods.dreambooth:DreamBooth",
            "bind a rare word to the subject by backpropagation: QLoRA, LoRA or the whole UNet",
        ),
        Command(
            SelectiveConfig,
            "persona.methods.selective:Selective",
            "backpropagate at low resolution or probe at high, step by step, on LoRA or scales",
        ),
    )
}


class _Parser(argparse.ArgumentParser):
    """Answers a typo in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"persona: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    parser = _Parser(prog="persona", description="Personalize a diffusion model.")
    parsers = parser.add_subparsers(dest="command", required=True)
    commands = _add_commands(parsers, argv)
    text = "tell the highest memory of each part of a run, without running it"
    planned = parsers.add_parser("plan", help=text, description=f"{text}.".capitalize())
    of_plan = _add_commands(planned.add_subparsers(dest="planned", required=True), argv)
    args, unknown = parser.parse_known_args(argv)
    name, found, act = args.command, commands, _run
    if name == "plan":
        name, found, act = args.planned, of_plan, _plan
    command = COMMANDS[name]
    if unknown:
        found[name].error(_unknown(unknown[0], command.config))
    try:
        return act(load_method(command.method), from_flags(args, command.config))
    except UserError as error:
        print(f"persona: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        told = str(stop) or "stopped; a checkpoint that was written stays"
        print(f"persona: {told}", file=sys.stderr)
        return 130


def _add_commands(parsers: Any, argv: Sequence[str] | None) -> dict[str, argparse.ArgumentParser]:
    """A subcommand for each of `COMMANDS`."""
    for name, command in COMMANDS.items():
        # What starts like one of the options is a typo as well.
        one = parsers.add_parser(name, help=command.help, allow_abbrev=False)
        add_flags(one, command.config)
        if command.config.presets:
            presets = sorted(command.config.presets)
            default = command.config.default_preset
            text = "a recipe that other flags change"
            text += f" (default, without --optimizer: {default!r})" if default else ""
            one.add_argument("--preset", choices=presets, help=text)
            one.set_defaults(**command.config.presets.get(_preset(argv, default), {}))
    made: dict[str, argparse.ArgumentParser] = parsers.choices
    return made


def _preset(argv: Sequence[str] | None, default: str) -> str:
    """The preset that is asked for: it must be known before the other flags have defaults.

    Who names an optimizer and no preset builds a recipe of his own, from the fields' defaults.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset")
    parser.add_argument("--optimizer")
    try:
        found = parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:  # without a value: the whole parser tells
        return ""
    if found.preset is not None or found.optimizer is not None:
        return found.preset or ""
    return default


def load_method(name: str) -> Any:
    """The class that a `Command` names as module:class."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _run(method: Any, config: RunConfig) -> int:
    from persona.memory import human
    from persona.train import train

    result = train(method, config)
    print(f"{result.saved}: {result.steps} steps, {result.forwards} forwards")
    peaks = ", ".join(f"{human(peak)} {part}" for part, peak in result.peaks.items())
    print(f"highest memory: {peaks}")
    if result.rejected:
        print(f"{result.rejected} steps changed nothing: their loss was not finite")
    return 0


def _plan(method: Any, config: RunConfig) -> int:
    from persona.plan import plan

    print(plan(method, config))
    return 0


def _unknown(word: str, config: type[RunConfig]) -> str:
    known = [flag for item in dataclasses.fields(config) for flag in flags(item)]
    near = difflib.get_close_matches(word.split("=")[0], known, 1)
    hint = f"; did you mean {near[0]}" if near else ""
    return f"{word}: must be an option of the command, got one it does not know{hint}"


if __name__ == "__main__":
    raise SystemExit(main())
