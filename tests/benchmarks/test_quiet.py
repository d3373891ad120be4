# SPDX-License-Identifier: Apache-2.0
import fcntl
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.quiet import PATIENCE, QUIET, Disturbance, Hold, enough, held, quietest


def test_quietest_keeps_their_order():
    attempts = [(0.5, "a"), (0.0, "b"), (0.2, "c"), (0.0, "d"), (0.01, "e")]
    assert quietest(3, attempts) == ["b", "d", "e"]
    assert quietest(9, attempts) == ["a", "b", "c", "d", "e"]


def test_enough_waits_for_quiet_rounds_but_not_for_ever():
    assert not enough([], 1)
    assert not enough([1.0] * 2, 2)
    assert enough([1.0, 0.0, QUIET], 2)
    assert enough([1.0] * (PATIENCE * 2), 2)


def test_held_exclusive_keeps_others_out(tmp_path):
    lock = tmp_path / "lock"
    with held(lock, exclusive=True), lock.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with held(lock, exclusive=False), lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    with held(None, exclusive=True):
        pass


def test_hold_lets_go_between_rounds(tmp_path):
    lock = tmp_path / "lock"

    def free():
        with lock.open() as other:
            try:
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True

    with Hold(lock, seconds=0) as hold, ThreadPoolExecutor() as pool:
        assert not free()
        with lock.open() as other:
            waiting = pool.submit(fcntl.flock, other, fcntl.LOCK_SH)
            assert not waiting.done()
            renewed = pool.submit(hold.renew)
            waiting.result(10)
        renewed.result(10)
        assert not free()
    assert free()
    with Hold(None) as hold:
        hold.renew()


def test_own_work_is_no_disturbance():
    disturbance = Disturbance()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    # Others may be at work on this machine; this process alone must not make up the whole.
    assert 0 <= disturbance.share() <= 1
