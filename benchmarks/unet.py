# SPDX-License-Identifier: Apache-2.0
"""One forward of a whole UNet: this package's quantized modules beside what else a user can run.

    python -m benchmarks.unet --model sd15 --peers torch,quanto,openvino [--specs w8a8,w4a8-g64]

Every stack lives in a process of its own and runs one forward when told, so that rounds take turns
and the peak of memory is that stack's alone. Each output is compared with torch's in fp32. The
peers are installed by `make peers`; conversions are kept in the folder of --cache.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks import module_profile, sd15
from benchmarks.quiet import PATIENCE, QUIET, Hold, enough, held, pause, quietest
from benchmarks.timing import machine
from benchmarks.unet_stacks import PEERS, Job, Stack, stacks
from zo_kernels._files import atomic_write

REFERENCE = "torch-fp32"
OURS = ["w8a8", "w4a8-g64"]
GIB = 2**30


@dataclass(frozen=True)
class UNetRow:
    """One stack at one batch size.

    seconds: the rounds that others disturbed least. peak, loading_peak: bytes held at most while it
    ran, and while it was loaded. error: |y - torch fp32's y| / |torch fp32's y| in the 2-norm.
    disturbed: the most of the cores that others took in a round. failed: why there is no row.
    """

    stack: str
    title: str
    batch: int
    seconds: tuple[float, ...] = ()
    peak: int = 0
    loading_peak: int = 0
    load_seconds: float = 0.0
    error: float | None = None
    disturbed: float = 0.0
    failed: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Worker:
    """The process of one stack."""

    def __init__(self, task: str, job: Job, threads: int, log: Path) -> None:
        given = asdict(job) | {"cache": str(job.cache), "task": task, "threads": threads}
        command = [sys.executable, "-m", "benchmarks.unet_worker", json.dumps(given)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self.first = self._answer()

    def ask(self, *command: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            return {"failed": f"ended with code {code}; see {self.log}"}
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def measure(
    chosen: Sequence[Stack], batch: int, given: argparse.Namespace, logs: Path
) -> tuple[list[UNetRow], dict[str, list[dict[str, Any]]]]:
    """The rows of one batch size, and the profiles if they are asked for."""
    failed: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    runs: dict[str, list[tuple[float, float]]] = {s.name: [] for s in chosen}
    errors: dict[str, float] = {}
    peaks: dict[str, int] = {}
    profiles: dict[str, list[dict[str, Any]]] = {}

    def ask(name: str, *command: object) -> dict[str, Any]:
        answer = workers[name].ask(*command)
        if "failed" in answer:
            failed[name] = answer["failed"]
            workers.pop(name).close()
        return answer

    try:
        for stack in chosen:
            job = Job(stack.name, given.model, batch, given.cache, given.seed)
            for task in ("prepare", "run") if stack.prepare else ("run",):
                with held(given.lock, exclusive=False):
                    worker = Worker(task, job, given.threads, logs / f"{stack.name}-{task}.log")
                if "failed" in worker.first:
                    failed[stack.name] = worker.first["failed"]
                if task == "prepare" or stack.name in failed:
                    worker.close()
                else:
                    workers[stack.name] = worker
                if stack.name in failed:
                    break
        loaded = {name: worker.first for name, worker in workers.items()}
        outputs = {name: logs / f"{name}.pt" for name in workers}
        for name in list(workers):
            with held(given.lock, exclusive=False):
                ask(name, "save", str(outputs[name]))
        if REFERENCE in workers:
            errors = {name: _error(outputs[name], outputs[REFERENCE]) for name in workers}
        with Hold(given.lock) as hold:
            for number in range(PATIENCE * given.rounds):
                hold.renew()
                for name in list(workers):
                    if enough([share for share, _ in runs[name]], given.rounds):
                        continue
                    answer = ask(name, "run")
                    if name in workers:
                        runs[name].append((answer["disturbed"], answer["seconds"]))
                        told = f"round {number}: {name} {answer['seconds']:.2f} s"
                        print(f"{told}, others {answer['disturbed']:.0%}", file=sys.stderr)
                        pause(answer["disturbed"])
        for name in list(workers):
            peaks[name] = ask(name, "peak").get("peak", 0)
        if given.profile:
            for name in list(workers):
                with held(given.lock, exclusive=True):
                    profiles[name] = ask(name, "profile", min(given.rounds, 3)).get("profile")
    finally:
        for worker in workers.values():
            worker.close()
    rows = [
        _row(s, batch, given.rounds, runs[s.name], loaded, peaks, errors, failed) for s in chosen
    ]
    return rows, {name: rows for name, rows in profiles.items() if rows}


def _row(
    stack: Stack,
    batch: int,
    rounds: int,
    runs: list[tuple[float, float]],
    loaded: dict[str, dict[str, Any]],
    peaks: dict[str, int],
    errors: dict[str, float],
    failed: dict[str, str],
) -> UNetRow:
    name = stack.name
    if name in failed:
        return UNetRow(name, stack.title, batch, failed=failed[name])
    first = loaded[name]
    return UNetRow(
        name,
        stack.title,
        batch,
        tuple(quietest(rounds, runs)),
        peaks[name],
        first["loading_peak"],
        first["load_seconds"],
        errors.get(name),
        max(sorted(share for share, _ in runs)[:rounds]),
    )


def _error(path: Path, reference: Path) -> float:
    y, expected = torch.load(path), torch.load(reference)
    return float((y - expected).norm() / expected.norm())


def text_of(title: str, rows: Sequence[UNetRow]) -> str:
    """The rows as Markdown."""
    lines = [
        f"**{title}**",
        "",
        "| | median s | range | x torch fp32 | peak GiB | while loading | rel. error |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = next((r.median for r in rows if r.stack == REFERENCE and not r.failed), None)
    for r in rows:
        if r.failed:
            lines.append(f"| {r.title} | {r.failed.splitlines()[0][:120]} | | | | | |")
            continue
        error = "" if r.error is None else f"{r.error:.1e}"
        speed = "" if reference is None else f"{reference / r.median:.2f}"
        lines.append(
            f"| {r.title} | {r.median:.2f} | {min(r.seconds):.2f} to {max(r.seconds):.2f} "
            f"| {speed} | {r.peak / GIB:.2f} | {r.loading_peak / GIB:.2f} | {error} |"
        )
    noisy = [r for r in rows if r.disturbed > QUIET]
    if noisy:
        most = max(r.disturbed for r in noisy)
        lines += ["", f"Others took up to {most:.0%} of the cores in {len(noisy)} of these rows."]
    return "\n".join(lines) + "\n"


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.unet", description=__doc__)
    parser.add_argument("--model", choices=sd15.ARCHITECTURES, default="sd15")
    parser.add_argument("--peers", type=_words, default=list(PEERS), help=",".join(PEERS))
    parser.add_argument(
        "--specs", type=_words, default=OURS, help="ours, such as w8a8,w4a8@bf16:unfused"
    )
    parser.add_argument("--stacks", type=_words, help="only those whose name fits, as *-fp32,zo-*")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="also where the time goes")
    parser.add_argument("--cache", type=Path, default=Path("build/unet"), help="for conversions")
    parser.add_argument("--lock", type=Path, help="file to hold while timing (flock)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/unet.json"))
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.peers) - set(PEERS))
    if unknown:
        parser.error(f"--peers must be some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if given.rounds < 1 or min(given.batch) < 1:
        parser.error("--rounds and --batch must be at least 1")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m benchmarks.unet``; the exit code: 1 if a stack failed."""
    given = parse(arguments)
    chosen = stacks(given.peers, given.specs)
    if given.stacks:
        chosen = [s for s in chosen if any(fnmatchcase(s.name, p) for p in given.stacks)]
    given.cache.mkdir(parents=True, exist_ok=True)
    title = sd15.ARCHITECTURES[given.model].title
    groups: list[dict[str, Any]] = []
    profiles: dict[str, Any] = {}
    words = sys.argv[1:] if arguments is None else list(arguments)
    kept = {
        "command": shlex.join(["python", "-m", "benchmarks.unet", *words]),
        "machine": machine() | {"threads": given.threads},
        "groups": groups,
        "profiles": profiles,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for batch in given.batch:
        with tempfile.TemporaryDirectory(dir=given.cache) as outputs:
            rows, found = measure(chosen, batch, given, Path(outputs))
        name = f"{title}, batch {batch}"
        print(text_of(name, rows), flush=True)
        groups.append({"title": name, "rows": [asdict(row) for row in rows]})
        for stack, profile in found.items():
            profiles[f"{name}, {stack}"] = profile
            print(f"**{name}, {stack}**\n\n{module_profile.table(profile)}", flush=True)
        with atomic_write(given.out) as temporary:  # now: an interruption costs one batch at most
            temporary.write_text(json.dumps(kept, indent=1) + "\n")
    return int(any(row["failed"] for group in groups for row in group["rows"]))


if __name__ == "__main__":
    sys.exit(main())
