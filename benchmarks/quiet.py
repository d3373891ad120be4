# SPDX-License-Identifier: Apache-2.0
"""Timing on a machine that others use too: a lock that keeps it quiet, and how quiet it was."""

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self, TypeVar

Round = TypeVar("Round")
QUIET = 0.03  # share of the cores that others may take in a round; else it is repeated
PATIENCE = 3  # times the rounds asked for, at most


@contextmanager
def held(lock: Path | None, exclusive: bool) -> Iterator[None]:
    """Holds the file `lock` as flock(1) does: work that is not timed holds it shared, so that it
    waits while a timing holds it alone. None: nothing is held."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


class Hold:
    """Holds `lock` alone inside `with`, but for a moment's release at the first `renew` after
    `seconds`, so that others get their turn between two rounds."""

    def __init__(self, lock: Path | None, seconds: float = 100.0) -> None:
        self._lock, self._seconds = lock, seconds
        self._held = ExitStack()

    def __enter__(self) -> Self:
        self._held.enter_context(held(self._lock, exclusive=True))
        self._since = time.monotonic()
        return self

    def renew(self) -> None:
        if time.monotonic() - self._since > self._seconds:
            self._held.close()
            time.sleep(2)  # whoever waits gets it
            self.__enter__()

    def __exit__(self, *_: object) -> None:
        self._held.close()


class Disturbance:
    """The share of the machine's cores that others took since it was made: other processes, and
    the host of a virtual machine. 0 where the system does not tell."""

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float:
        (busy, everything, own), (busy0, everything0, own0) = _ticks(), self._before
        if everything == everything0:
            return 0.0
        return max(0.0, (busy - busy0 - (own - own0)) / (everything - everything0))


def _ticks() -> tuple[float, float, float]:
    """Seconds times cores since the start: busy, in all, and of this process."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0, 0.0, 0.0
    fields = [int(f) for f in stat.read_text().splitlines()[0].split()[1:9]]
    per_second = os.sysconf("SC_CLK_TCK")
    idle = fields[3] + fields[4]
    times = os.times()
    return (sum(fields) - idle) / per_second, sum(fields) / per_second, times.user + times.system


def enough(shares: Sequence[float], rounds: int) -> bool:
    """Whether `rounds` rounds with these disturbances were quiet, or patience is at its end."""
    return sum(share <= QUIET for share in shares) >= rounds or len(shares) >= PATIENCE * rounds


def pause(share: float) -> None:
    """Waits a moment after a disturbed round, so that a short burst of others passes."""
    if share > QUIET:
        time.sleep(0.5)


def quietest(rounds: int, attempts: Sequence[tuple[float, Round]]) -> list[Round]:
    """The `rounds` of (disturbance, round) that were disturbed least, in their order."""
    order = sorted(range(len(attempts)), key=lambda i: attempts[i][0])[:rounds]
    return [attempts[i][1] for i in sorted(order)]
