"""The readahead planner, alone and in a store."""

from __future__ import annotations

import pytest
from cow_sources import MemorySource, pattern, read_chunk

from cow import COWStore, ReadaheadOptions
from cow.reader import ReadaheadPlanner

CHUNK = 4096
OPTIONS = ReadaheadOptions(max_bytes=16 * CHUNK)


def nothing_skipped(position: int) -> bool:
    return False


def run(positions, count=1000, options=OPTIONS, skip=nothing_skipped):
    planner = ReadaheadPlanner(options, CHUNK)
    return planner, [planner.touched(position, count, skip) for position in positions]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([0, 1, 2], [[], [], [3, 4]]),
        ([50, 49, 48], [[], [], [47, 46]]),
        ([10, 13, 16], [[], [], [19, 22]]),
        ([0, 100, 200], [[], [], []]),
        ([5, 5, 5], [[], [], []]),
        ([0, 1, 3], [[], [], []]),
    ],
)
def test_equal_small_steps_start_it_nearest_first(positions, expected):
    assert run(positions)[1] == expected


def test_the_window_doubles_up_to_the_bound_and_every_position_is_asked_for_once():
    _, plans = run(range(200))
    sizes = [len(plan) for plan in plans if plan]
    assert sizes[0] == 2
    assert max(sizes) <= 16
    asked = [position for plan in plans for position in plan]
    assert len(asked) == len(set(asked))
    assert set(range(3, 200)) <= set(asked)
    for position, plan in enumerate(plans):
        assert all(0 < other - position <= 16 for other in plan)


def test_requests_go_out_in_batches():
    _, plans = run(range(200))
    assert sum(1 for plan in plans if plan) < 60


def test_what_need_not_be_asked_for_is_skipped():
    _, plans = run(range(100), skip=lambda position: position % 2 == 0)
    assert all(position % 2 for plan in plans for position in plan)


def test_it_ends_at_the_borders():
    _, plans = run(range(10), count=10)
    assert max(position for plan in plans for position in plan) == 9
    _, plans = run(range(9, -1, -1), count=10)
    assert min(position for plan in plans for position in plan) == 0


def test_a_jump_ends_a_sequence():
    planner, _ = run(range(10))
    assert planner.touched(500, 1000, nothing_skipped) == []
    assert planner.touched(501, 1000, nothing_skipped) == []
    assert planner.touched(502, 1000, nothing_skipped) == [503, 504]


def test_two_readers_of_one_sequence_do_not_stop_it():
    order = [position ^ 1 if position >= 20 else position for position in range(300)]
    planner, _ = run(order)
    assert planner.used > 250


def bursts(number):
    """Three in a row, then far away: each looks like a sequence and is none."""
    return [start * 40 + step for start in range(number) for step in range(3)]


def test_a_poor_hit_ratio_pauses_it_and_it_tries_again_later():
    planner, plans = run(bursts(400), count=100_000)
    without = ReadaheadOptions(max_bytes=16 * CHUNK, poor_ratio=0.0)
    eager, _ = run(bursts(400), count=100_000, options=without)
    assert planner.issued < eager.issued / 2
    late = [plan for plan in plans[600:] if plan]
    assert late, "it never tried again"


def test_what_is_remembered_is_bounded():
    planner, _ = run(
        bursts(2000), count=1_000_000, options=ReadaheadOptions(max_bytes=16 * CHUNK, poor_ratio=0)
    )
    assert len(planner._asked) <= 4 * 16


@pytest.mark.parametrize(
    "options", [{"max_bytes": -1}, {"poor_ratio": 2}, {"min_chunks": 0}, {"streak": 0}, {"max_stride": 0}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match="must"):
        ReadaheadOptions(**options)


def test_a_store_asks_ahead_across_holes_and_counts_what_was_used(tmp_path):
    content = pattern(40 * CHUNK)
    source = MemorySource(content, CHUNK)
    present = list(range(0, 40, 2))
    with COWStore(
        tmp_path / "store",
        size=len(content),
        chunk_size=CHUNK,
        chunks=present,
        source=source,
        readahead=OPTIONS,
    ) as store:
        for index in range(40):
            read_chunk(store, index)
        statistics = store.statistics()
    asked = [index for batch in source.prefetched for index in batch]
    assert asked == present[3:]
    assert statistics.prefetch_issued == statistics.prefetch_used == 17
    assert statistics.origins["remote"].prefetched == 17
    assert statistics.origins["remote"].chunks == 20
    assert statistics.origins["hole"].chunks == 20


def test_readahead_can_be_off(tmp_path):
    source = MemorySource(pattern(20 * CHUNK), CHUNK)
    with COWStore(
        tmp_path / "s", size=20 * CHUNK, chunk_size=CHUNK, chunks=range(20), source=source, readahead=None
    ) as store:
        store.read_at(0, store.size)
    assert source.prefetched == []


def test_a_source_that_fails_to_take_a_hint_does_not_fail_the_read(tmp_path, caplog):
    source = MemorySource(pattern(20 * CHUNK), CHUNK)

    def refuse(indices):
        raise RuntimeError("no hints, please")

    source.prefetch = refuse
    with COWStore(
        tmp_path / "s", size=20 * CHUNK, chunk_size=CHUNK, chunks=range(20), source=source
    ) as store:
        assert store.read_at(0, store.size) == source.content
    assert "no hints, please" in caplog.text
