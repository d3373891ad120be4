# SPDX-License-Identifier: Apache-2.0
"""The most operations a second that the cores can do from registers: what a kernel is held against.

python -m benchmarks.peak
"""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.c")
NEEDED = "avx512_vnni"
ROUNDS = 2_500_000  # about 10 ms at 2.8 GHz
OPERATIONS = {"int8": 24 * 64 * 2, "fp32": 24 * 16 * 2}  # a round; a product and a sum are two


def unavailable() -> str | None:
    """None, or why this machine's peak cannot be measured."""
    info = Path("/proc/cpuinfo")
    if not info.exists() or NEEDED not in info.read_text():
        return f"this CPU has no {NEEDED}, the only instruction set that the loop is written for"
    if compiler() is None:
        return "there is no C compiler (cc) to build the loop with"
    return None


def compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def loops(threads: int) -> dict[str, Callable[[], None]]:
    """ "int8" and "fp32": a call runs `ROUNDS` rounds on each of `threads` threads.

    Raises:
        RuntimeError: what `unavailable` says.
    """
    why, program = unavailable(), compiler()
    if why is not None or program is None:
        raise RuntimeError(f"peak: {why}")
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "peak.so"
        subprocess.run([program, "-O2", "-shared", "-fPIC", "-o", built, SOURCE], check=True)
        library = ctypes.CDLL(str(built))  # stays mapped when the file is gone
    pool = ThreadPoolExecutor(threads)

    def on_every_thread(name: str) -> Callable[[], None]:
        function = getattr(library, f"{name}_rounds")  # ctypes lets go of the GIL
        function.argtypes, function.restype = [ctypes.c_long], None

        def call() -> None:
            for job in [pool.submit(function, ROUNDS) for _ in range(threads)]:
                job.result()

        return call

    return {name: on_every_thread(name) for name in OPERATIONS}


def operations(name: str, threads: int) -> float:
    """What one call of `loops(threads)[name]` does."""
    return float(OPERATIONS[name] * ROUNDS * threads)


def best(name: str, threads: int, turns: int = 50) -> float:
    """Tera-operations a second in the fastest of `turns` turns: what the cores can do when nothing
    else asks for them.

    Raises:
        RuntimeError: what `unavailable` says.
    """
    loop, fastest = loops(threads)[name], float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        loop()
        fastest = min(fastest, time.perf_counter() - start)
    return operations(name, threads) / fastest / 1e12


def main() -> None:
    from benchmarks.timing import in_turns, machine

    threads = torch.get_num_threads()
    print(machine())
    for count in sorted({1, threads}):
        for row in in_turns(loops(count), floor="int8", rounds=9):
            done = operations(row.name, count)
            print(f"{row.name}, {count} threads: {done / row.median_ms / 1e9:.3f} Tera/s")


if __name__ == "__main__":
    main()
