"""Both ways to drive the imagination give the same returns, and are timed."""

import pytest

from rlawm_jax.rl.benchmark import format_markdown, measure
from rlawm_jax.rl.setup import prepare
from tests.rl.tiny import make


@pytest.mark.slow
def test_both_ways_are_timed_and_agree(tiny_root, cloned):
    found = measure(prepare(make(tiny_root, cloned)), [1, 5], repeats=2)
    assert [one.batch for one in found] == [1, 5]
    assert all(one.compiled > 0 and one.stepwise > 0 and one.ratio > 0 for one in found)
    assert format_markdown(found).count("\n") == 3
