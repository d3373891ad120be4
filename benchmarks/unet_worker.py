# SPDX-License-Identifier: Apache-2.0
"""One stack in a process of its own: prepares or loads it, then runs one forward when told.

`benchmarks.unet` starts it and talks to it in lines of JSON; see `answers`. A process of its own
makes the peak of memory that stack's alone, and lets rounds of all stacks take turns.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks import module_profile
from benchmarks.quiet import Disturbance
from benchmarks.unet_stacks import PEERS, Job, Stack, stacks


def peak_bytes() -> int:
    """The most memory that this process held since `reset_peak`, or since its start."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> bool:
    """Give freed memory back and let the peak start again; False where the system cannot."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def answers(stack: Stack, job: Job, commands: Iterable[list[Any]]) -> Iterator[dict[str, Any]]:
    """Loads the stack, then answers each command.

    ["run"] -> {"seconds", "disturbed"}, see `quiet`; ["save", path] -> the same for a forward whose
    output it writes as a torch file; ["peak"] -> {"peak"} in bytes since loading;
    ["profile", rounds] -> {"profile"}. The first answer, before any command:
    {"load_seconds", "loading_peak", "reset"}.
    """
    start = time.perf_counter()
    forward, model = stack.load(job)
    loaded = time.perf_counter() - start
    loading_peak = peak_bytes()
    yield {"load_seconds": loaded, "loading_peak": loading_peak, "reset": reset_peak()}
    for command, *arguments in commands:
        if command == "peak":
            yield {"peak": peak_bytes()}
        elif command == "profile":
            known = model is not None
            rows = module_profile.profile(forward, model, *arguments) if known else None
            yield {"profile": rows}
        else:
            disturbance = Disturbance()
            start = time.perf_counter()
            output = forward()
            seconds = time.perf_counter() - start
            disturbed = disturbance.share()
            if command == "save":
                torch.save(output, arguments[0])
            yield {"seconds": seconds, "disturbed": disturbed}


def main() -> None:
    given = json.loads(sys.argv[1])
    # Libraries print: only this file's lines may reach the pipe.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()

    torch.set_num_threads(given.pop("threads"))
    task = given.pop("task")
    job = Job(**given | {"cache": Path(given["cache"])})
    spec = [job.stack.removeprefix("zo-")] if job.stack.startswith("zo-") else []
    stack = next(s for s in stacks(PEERS, spec) if s.name == job.stack)
    try:
        if task == "prepare":
            if stack.prepare is not None:
                stack.prepare(job)
            say({"done": True})
        else:
            for answer in answers(stack, job, (json.loads(line) for line in sys.stdin)):
                say(answer)
    except ImportError as error:
        say({"failed": f"{error}; `make peers` installs what the other stacks need"})
        raise
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
