# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from persona.errors import UserError
from persona.intervals import Intervals


@pytest.mark.parametrize(("count", "limit"), [(1, 1000), (4, 1000), (3, 1000), (7, 50)])
def test_uniform_is_the_floor_of_the_papers(count, limit):
    intervals = Intervals.uniform(count, limit)
    assert intervals.count == count
    assert [intervals.of(t) for t in range(limit)] == [t * count // limit for t in range(limit)]
    assert intervals.of(limit) is None


def test_selected_ranges_share_a_set_and_leave_the_rest():
    intervals = Intervals.selected("0-250, 500-1000")
    assert intervals.count == 1
    assert [intervals.of(t) for t in (0, 249, 250, 499, 500, 999)] == [0, 0, None, None, 0, 0]
    groups = intervals.groups(torch.tensor([700, 300, 10, 499]))
    assert {number: members.tolist() for number, members in groups.items()} == {
        0: [0, 2],
        None: [1, 3],
    }


def test_timesteps_are_uniform_over_what_is_covered():
    g = torch.Generator().manual_seed(0)
    t = Intervals.selected("0-10,90-200").sample(20_000, 5, 100, g)
    counts = torch.bincount(t, minlength=100)
    assert counts[5:10].min() > 0 and counts[90:100].min() > 0
    assert int(counts[:5].sum() + counts[10:90].sum()) == 0 and t.max() < 100
    share = counts[90:].sum() / len(t)
    assert abs(share - 10 / 15) < 5 * (10 / 15 * 5 / 15 / len(t)) ** 0.5


@pytest.mark.parametrize("text", ["", "5", "9-3", "0-10,5-20", "a-b", "0-10;20-30", "10-10"])
def test_bad_ranges_are_refused(text):
    with pytest.raises(UserError, match="intervals: must be rising ranges such as 0-250,500-1000"):
        Intervals.selected(text)


def test_no_timestep_is_refused():
    with pytest.raises(UserError, match=r"intervals: must cover timesteps of 0 to 50, got 60-70"):
        Intervals.selected("60-70").sample(1, 0, 50, torch.Generator())
