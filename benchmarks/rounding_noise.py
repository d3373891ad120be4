# SPDX-License-Identifier: Apache-2.0
"""Does rounding the activations swamp the loss difference of a small probe?

    python -m benchmarks.rounding_noise --probes token,scale_relative,weight,codes --fp32

Directional derivatives (L(+eps) - L(-eps)) / (2 eps), and one-sided ones, of the demo's loss on
tiny-sd: batches of 4 of its pictures, timesteps 400 to 999, 32 directions over 4 minibatches, the
same in every model. Noise is the difference between "w8a8" and "w8": the same integer weights, with
activations rounded to int8 or exact. Bias is the distance of "w8" from backpropagation.

What came out (`results/rounding_noise.json`):

- Rounding adds 3.4e-4 to 8.6e-4 to each loss of 0.34 (0.1 to 0.25 %), whatever eps is and whatever
  is probed. So the noise of an estimate falls as 1 / eps, and a probe is safe when it changes the
  loss by more than that: a question of eps, not of the kind of probe.
- Signal at least 3 times the noise (rounding adds 11 % to the variance of an estimate) from:

  | probe | two-sided | one-sided | bias there |
  |---|---|---|---|
  | token, elements of rms 0.023 | 3e-3 | 1e-2 | 5 %, 19 % |
  | scales, relative | 1e-2 | 3e-2 | 2 %, 31 % |
  | weights, in codes | 0.3 | 1 | 1 %, 26 % |

- Token: the best eps under w8a8 is 1e-2 (all errors 8 % two-sided, 18 % one-sided), 0.45 of an
  element's rms. Beyond it bias rules, not rounding. At the paper's 1e-3, one-sided, noise is as
  large as the signal: half of the evaluations are lost.
- A token by one-sided estimates (eps 2e-2, n 15) may run on w8a8: signal to noise 22,
  correlation with w8 0.999, all signs the same, error against backpropagation 32 % instead of
  w8's 33 %.
- Codes by whole steps are as good as weights by the same steps (16 directions).
- w8 itself is no limit: fp32 weights give the same token slopes to about 1 % at every eps (8
  directions; for scales and weights the control is backpropagation alone).

What it decides:

- w8a8 is the default of forward passes whose probes are at or above these eps; two-sided eps of
  1e-2 (token), 3e-2 (relative scales, bias 3 %) and 1 code (weights and codes, bias 1 %).
- Scales and weights are probed two-sided: where a one-sided probe is above the rounding, its bias
  is 26 % and more.
- Smaller probes take exact activations: "w8" stays the default of a recipe with eps 1e-3.

Loss noise falls as latents and batch grow and was measured on this model only: measure again (a few
directions are enough) before taking the figures to another one.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import charts
from benchmarks.rounding_probes import Minibatch, Subject, setting, slopes
from benchmarks.timing import machine
from persona.demo import ASSETS, RECIPE
from persona.errors import UserError
from persona.files import make_folder, write_image, write_json
from persona.report import table

EPS = {
    "token": (3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 5e-2, 1e-1, 3e-1),
    "scale_relative": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "weight": (3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
    "codes": (1.0, 3.0),
}
UNITS = {
    "token": "units of the embedding, normal directions",
    "scale_relative": "relative to each output channel's scale, random signs",
    "weight": "codes (1/124 of a channel's largest weight), random signs",
    "codes": "whole codes, random signs",
}
SNR = 3.0  # rounding then adds 1 / SNR^2 = 11 % to the variance of an estimate


def agreement(estimate: Tensor, reference: Tensor) -> dict[str, float]:
    """How well one set of slopes stands for another: signal, noise and what follows from them."""
    noise = (estimate - reference).square().mean().sqrt()
    signal = reference.square().mean().sqrt()
    both = torch.stack([estimate.flatten(), reference.flatten()])
    return {
        "signal_mean_abs": float(reference.abs().mean()),
        "signal_rms": float(signal),
        "noise_rms": float(noise),
        "snr": float(signal / noise.clamp_min(1e-300)),
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "sign_agreement": float((estimate.sign() == reference.sign()).double().mean()),
    }


def measure(
    subjects: dict[str, Subject],
    probe: str,
    eps_values: Sequence[float],
    batches: Sequence[Minibatch],
    directions: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The rows of one kind of probe, an eps each; "w8" and "w8a8" must be among the subjects.

    Every minibatch has directions of its own.
    """
    draws = [
        list(range(i * directions, (i + 1) * directions)) for i in range(len(batches))
    ]  # [batches][directions]
    pairs = list(zip(draws, batches, strict=True))
    exact = torch.stack([slopes(subjects["w8"], probe, d, b) for d, b in pairs])
    base = {
        name: torch.stack([s.losses(probe, [0], [0.0], b) for b in batches])
        for name, s in subjects.items()
    }  # [batches, 1]
    rows = []
    for eps in eps_values:
        two, one, away = {}, {}, {}
        for name, subject in subjects.items():
            seen = pairs[:1] if name == "fp32" else pairs  # a control needs less
            sides = [
                torch.stack(
                    [subject.losses(probe, d, [sign * eps] * directions, b) for d, b in seen]
                )
                for sign in (1.0, -1.0)
            ]
            two[name] = (sides[0] - sides[1]) / (2 * eps)
            one[name] = (sides[0] - base[name][: len(seen)]) / eps
            away[name] = torch.cat(sides, 1)
        shift = away["w8a8"] - away["w8"]
        row: dict[str, Any] = {
            "eps": eps,
            "two_sided": agreement(two["w8a8"], two["w8"]),
            "one_sided": agreement(one["w8a8"], one["w8"]),
            # Bias: how far the difference quotient is from the derivative, without rounding.
            "bias_two_sided": 1 / agreement(two["w8"], exact)["snr"],
            "bias_one_sided": 1 / agreement(one["w8"], exact)["snr"],
            "all_two_sided": agreement(two["w8a8"], exact),
            "all_one_sided": agreement(one["w8a8"], exact),
            # Of one loss: what activation rounding adds to it, less its mean over the directions.
            "loss_noise": float((shift - shift.mean(1, keepdim=True)).square().mean().sqrt()),
        }
        if "fp32" in two:
            row["fp32_two_sided"] = agreement(two["fp32"], two["w8"][:1])
        rows.append(row)
        say(
            f"{probe} eps {eps:g}: SNR {row['two_sided']['snr']:.2f} two-sided, "
            f"{row['one_sided']['snr']:.2f} one-sided"
        )
    return {
        "units": UNITS[probe],
        "directions": directions * len(batches),
        "minibatches": len(batches),
        "loss": float(base["w8"].mean()),
        "derivative_rms": float(exact.square().mean().sqrt()),
        "rows": rows,
        "safe_from": {
            side: safe_from([(row["eps"], row[side]["snr"]) for row in rows])
            for side in ("two_sided", "one_sided")
        },
    }


def safe_from(points: Sequence[tuple[float, float]]) -> float | None:
    """The least eps from which on the signal is at least SNR times the noise; None: nowhere."""
    safe = None
    for eps, snr in sorted(points, reverse=True):
        if not snr >= SNR:
            break
        safe = eps
    return safe


def report(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    out = []
    header = (
        "eps",
        "mean abs signal",
        "rms noise",
        "SNR",
        "correlation",
        "sign",
        "SNR one-sided",
        "bias",
        "bias one-sided",
    )
    for probe, found in figures["probes"].items():
        rows = [
            (
                f"{row['eps']:g}",
                f"{row['two_sided']['signal_mean_abs']:.3g}",
                f"{row['two_sided']['noise_rms']:.3g}",
                f"{row['two_sided']['snr']:.2f}",
                f"{row['two_sided']['correlation']:.3f}",
                f"{row['two_sided']['sign_agreement']:.0%}",
                f"{row['one_sided']['snr']:.2f}",
                f"{row['bias_two_sided']:.1%}",
                f"{row['bias_one_sided']:.1%}",
            )
            for row in found["rows"]
        ]
        out.append(f"**{probe}** (eps in {found['units']})\n\n{table(header, rows)}\n")
    return "\n".join(out)


def chart(figures: dict[str, Any]) -> Any:
    """SNR over eps, a panel a kind of probe."""
    panels = []
    for probe, found in figures["probes"].items():
        if len(found["rows"]) < 4:
            continue  # codes: points of the curve of weight

        def line(
            get: Callable[[Any], float], rows: Any = found["rows"]
        ) -> list[tuple[float, float]]:
            return [(row["eps"], get(row)) for row in rows]

        lines = [
            charts.Line("w8a8, two-sided", line(lambda r: r["two_sided"]["snr"]), "#c0392b"),
            charts.Line("w8a8, one-sided", line(lambda r: r["one_sided"]["snr"]), "#e6a23c"),
            charts.Line(
                "bias of w8, two-sided", line(lambda r: 1 / r["bias_two_sided"]), "#1f5fa8"
            ),
            charts.Line(
                "bias of w8, one-sided", line(lambda r: 1 / r["bias_one_sided"]), "#6baed6"
            ),
        ]
        title, label = f"{probe}: signal / error", f"eps: {found['units']}"
        panels.append(charts.Panel(title, label, lines, level=SNR))
    return charts.draw(panels)


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.rounding_noise``; the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.rounding_noise")
    parser.add_argument("--model", default=str(ASSETS / "tiny-sd"), help="diffusers folder")
    parser.add_argument("--pictures", type=Path, default=ASSETS / "demo", help="folder")
    parser.add_argument("--probes", default=",".join(EPS), help="of " + ",".join(EPS))
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--directions", type=int, default=8, help="of each minibatch")
    parser.add_argument("--batch", type=int, default=RECIPE["train_batch_size"])
    parser.add_argument("--fp32", action="store_true", help="token: the model as shipped, too")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rounding_noise.json"))
    given = parser.parse_args(arguments)
    probes = given.probes.split(",")
    try:
        if not set(probes) <= set(EPS) or min(given.minibatches, given.directions, given.batch) < 1:
            raise UserError(
                f"rounding_noise: probes must be of {', '.join(EPS)} and counts at least 1, got "
                f"{given.probes}, {given.minibatches}, {given.directions}, {given.batch}; "
                "see --help"
            )
        make_folder(given.out.parent)
        found: dict[str, Any] = {}
        subjects, batches = setting(
            given.model,
            given.pictures,
            ("fp32", "w8", "w8a8") if given.fp32 else ("w8", "w8a8"),
            given.minibatches,
            given.batch,
        )
        for probe in probes:
            # Perturbing fp32 weights would need a copy of them: there the control is autograd.
            used = {k: s for k, s in subjects.items() if k != "fp32" or probe == "token"}
            found[probe] = measure(used, probe, EPS[probe], batches, given.directions)
            found[probe]["batch"] = given.batch
        found = _kept(given.out) | found  # probes can be run one by one
        figures = {
            "machine": machine(),
            "model": Path(given.model).name,
            "snr_required": SNR,
            "probes": {probe: found[probe] for probe in EPS if probe in found},
        }
        write_json(given.out, figures)
        write_image(given.out.with_suffix(".png"), chart(figures))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report(figures)}\n{given.out} and {given.out.with_suffix('.png')}")
    return 0


def _kept(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))["probes"] if path.exists() else {}


if __name__ == "__main__":
    sys.exit(main())
