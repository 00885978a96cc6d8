"""Slots: each has one owner, also when several ask at once."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from snaploader.errors import InvalidArgument, ResourceExhausted
from snaploader.workspace.host import SlotPool


def test_the_lowest_free_slot_is_given(tmp_path: Path) -> None:
    pool = SlotPool(tmp_path, 3)
    assert [pool.acquire("a"), pool.acquire("b"), pool.acquire("c")] == [0, 1, 2]
    assert pool.release(1, "b")
    assert pool.acquire("d") == 1


def test_a_pool_that_is_used_up_says_how_many_slots_there_are(tmp_path: Path) -> None:
    pool = SlotPool(tmp_path, 1)
    pool.acquire("a")
    with pytest.raises(ResourceExhausted, match="all 1 slots"):
        pool.acquire("b")


def test_a_slot_is_reserved_for_one_owner_only(tmp_path: Path) -> None:
    pool = SlotPool(tmp_path)
    assert pool.reserve(7, "a")
    assert pool.reserve(7, "a")
    assert not pool.reserve(7, "b")
    assert pool.owner(7) == "a"


@pytest.mark.parametrize("slot", [-1, 4, True, "1", None])
def test_what_is_no_slot_of_the_pool_cannot_be_reserved(tmp_path: Path, slot: object) -> None:
    assert not SlotPool(tmp_path, 4).reserve(slot, "a")  # type: ignore[arg-type]


def test_a_slot_is_released_by_its_owner_only(tmp_path: Path) -> None:
    pool = SlotPool(tmp_path)
    pool.reserve(0, "a")
    assert not pool.release(0, "b")
    assert pool.release(0, "a")
    assert not pool.release(0, "a")
    assert pool.owner(0) is None


def test_slots_survive_the_pool(tmp_path: Path) -> None:
    SlotPool(tmp_path).acquire("a")
    assert SlotPool(tmp_path).owners() == {0: "a"}


def test_owners_that_ask_at_once_get_different_slots(tmp_path: Path) -> None:
    slots: list[int] = []
    barrier = threading.Barrier(8)

    def take(number: int) -> None:
        pool = SlotPool(tmp_path)
        barrier.wait()
        slots.append(pool.acquire(f"owner-{number}"))

    threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(slots) == list(range(8))


def test_an_empty_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        SlotPool(tmp_path, 0)


def test_what_is_no_slot_but_lies_in_the_place_of_one_is_nobody_s_and_not_to_be_had(tmp_path: Path) -> None:
    pool = SlotPool(tmp_path, 2)
    (tmp_path / "0").write_text("x")
    assert (pool.owner(0), pool.owners()) == (None, {})
    assert not pool.reserve(0, "one")
    assert pool.acquire("one") == 1
