"""The bounded cache of mappings, and arrays that outlive everything."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import resource
import threading
from functools import partial

import numpy as np
import pytest
from cow_sources import MemorySource, open_files, pattern, read_chunk
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cow import COWStore, MappingBudget, OpenedChunk, default_budget, mapping
from cow.mapping import CachePart, ClockCache, Resource

CHUNK = 8192


class Number(Resource):
    """A resource that is given back by appending it to a list."""

    def __init__(self, number: int, given_back: list[int], weight: int = 1) -> None:
        super().__init__(weight, partial(given_back.append, number))
        self.number = number
        self.rests = 0

    def rest(self) -> None:
        self.rests += 1


def test_what_is_in_use_stays_and_the_oldest_of_the_rest_goes():
    gone: list[int] = []
    cache = ClockCache(2, 100)
    part = CachePart(cache)
    first = part.add(0, Number(0, gone))
    for number in (1, 2, 3):
        part.add(number, Number(number, gone))
    assert gone == [1, 2]
    assert part.get(0) is first
    assert cache.weight == 2
    cache.trim()
    assert gone == [1, 2, 3]
    assert part.get(0) is first
    del first
    assert gone == [1, 2, 3, 0]
    assert part.get(0) is None
    assert cache.weight == cache.count == part.weight == 0


def test_what_was_looked_up_lately_has_a_second_chance():
    gone: list[int] = []
    part = CachePart(ClockCache(3, 100))
    for number in range(10):
        part.add(number, Number(number, gone))
        assert part.get(0) is not None
    assert gone == [1, 2, 3, 4, 5, 6, 7]


def test_the_number_of_entries_is_bounded_too():
    gone: list[int] = []
    part = CachePart(ClockCache(10**9, 3))
    for number in range(10):
        part.add(number, Number(number, gone))
    assert gone == [0, 1, 2, 3, 4, 5, 6]


def test_what_was_not_looked_up_lately_is_rested_and_let_go_of_first():
    gone: list[int] = []
    cache = ClockCache(5, 100, max_active_weight=2)
    part = CachePart(cache)
    numbers = [part.add(number, Number(number, gone)) for number in range(4)]
    assert [number.rests for number in numbers] == [1, 1, 0, 0]
    assert [number.active for number in numbers] == [False, False, True, True]
    assert part.get(0) is numbers[0]
    assert [number.rests for number in numbers] == [1, 1, 1, 0]
    assert cache.active_weight == 2
    assert cache.weight == 4
    del numbers
    part.add(4, Number(4, gone))
    part.add(5, Number(5, gone))
    assert gone == [1]
    part.discard(4)
    assert cache.active_weight == 1
    cache.trim()
    assert cache.active_weight == cache.weight == 0


class CacheMachine(RuleBasedStateMachine):
    """Never gives back what is in use, gives all back once, keeps to the bounds by what is not in use."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[int] = []
        self.made = 0
        self.used: list[Number] = []
        self.cache = ClockCache(5, 100, max_active_weight=3)
        self.parts = [CachePart(self.cache) for _ in range(2)]

    @rule(key=st.integers(0, 6), weight=st.integers(1, 3), findable=st.booleans())
    def add(self, key, weight, findable):
        part = self.parts[key % 2]
        number = Number(self.made, self.gone, weight)
        self.used.append(part.add(key, number, findable=findable))
        self.made += 1
        assert not findable or part.get(key) is number

    @rule(key=st.integers(0, 6))
    def get(self, key):
        number = self.parts[key % 2].get(key)
        if number is not None:
            assert number.number not in self.gone
            assert number.active or self.cache.max_active_weight < number.weight
            self.used.append(number)

    @rule(data=st.data())
    def let_go(self, data):
        if self.used:
            self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))

    @rule(key=st.integers(0, 6))
    def discard(self, key):
        self.parts[key % 2].discard(key)
        assert self.parts[key % 2].get(key) is None

    @rule(part=st.integers(0, 1))
    def clear(self, part):
        self.parts[part].clear()

    @rule()
    def trim(self):
        self.cache.trim()

    @invariant()
    def consistent(self):
        assert len(self.gone) == len(set(self.gone))
        assert not {number.number for number in self.used} & set(self.gone)
        assert self.cache.count == self.made - len(self.gone)
        assert self.parts[0].weight + self.parts[1].weight == self.cache.weight
        assert self.cache.active_weight <= 3
        assert self.cache.active_weight == sum(number.weight for number in self.cache._active)
        assert not any(number.active for number in self.cache._resting)
        used = {number.number: number.weight for number in self.used}
        assert (
            self.cache.weight <= max(5, sum(used.values())) + 3
        )  # up to one was let go of while it was not the turn of it

    def teardown(self):
        self.used.clear()
        for part in self.parts:
            part.clear()
        assert self.cache.weight == self.cache.count == 0
        assert sorted(self.gone) == list(range(self.made))


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCache = CacheMachine.TestCase


def test_what_dies_while_the_cache_is_locked_does_not_deadlock():
    gone: list[int] = []
    cache = ClockCache(0, 0)
    number = CachePart(cache).add(1, Number(1, gone))
    with cache._lock:
        del number
        assert gone == [1]
    assert cache.weight == 0


@pytest.mark.parametrize("name", ["max_bytes", "max_mappings", "max_descriptors", "max_resident_bytes"])
def test_negative_bounds_are_refused(name):
    with pytest.raises(ValueError, match=name):
        MappingBudget(**{name: -1})


@pytest.mark.parametrize(
    ("limit", "expected"), [(100, 64), (1024, 256), (20_000, 1024), (resource.RLIM_INFINITY, 1024)]
)
def test_a_quarter_of_the_files_that_a_process_may_open_is_the_default(monkeypatch, limit, expected):
    monkeypatch.setattr("cow.mapping.getrlimit", lambda _: (limit, resource.RLIM_INFINITY))
    assert MappingBudget().max_descriptors == expected
    assert MappingBudget(max_descriptors=3).max_descriptors == 3


def lazy_store(folder, chunks, budget, chunk_size=CHUNK):
    source = MemorySource(pattern(chunks * chunk_size), chunk_size)
    store = COWStore(
        folder,
        size=chunks * chunk_size,
        chunk_size=chunk_size,
        chunks=range(chunks),
        source=source,
        budget=budget,
        readahead=None,
    )
    return store, source


def test_mapped_bytes_stay_within_the_budget_and_end_at_zero(tmp_path):
    budget = MappingBudget(3 * CHUNK)
    store, source = lazy_store(tmp_path / "s", 10, budget)
    with store:
        for _ in range(2):
            for index in range(10):
                assert read_chunk(store, index) == source.content[index * CHUNK : (index + 1) * CHUNK]
                assert budget.mapped_bytes <= 3 * CHUNK
        assert store.statistics().mapped_bytes == budget.mapped_bytes == 3 * CHUNK
        assert set(source.opens.values()) == {2}
        read_chunk(store, 9)
        assert source.opens[9] == 2
        assert store.statistics().origins["remote"].chunks == 10
    assert budget.mapped_bytes == budget.mappings == 0


def resident_file_bytes() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile:"))


def test_resident_memory_stays_within_the_budget_and_no_chunk_is_opened_again(tmp_path):
    chunk, count = 1 << 20, 64
    (tmp_path / "chunk").write_bytes(pattern(chunk))

    class OneFile(MemorySource):
        def open_chunk(self, index):
            self.opens[index] += 1
            return OpenedChunk(os.open(tmp_path / "chunk", os.O_RDONLY | os.O_CLOEXEC), "file")

    source, budget = OneFile(b"", chunk), MappingBudget(max_resident_bytes=8 * chunk)
    before = resident_file_bytes()
    with COWStore(
        tmp_path / "s",
        size=count * chunk,
        chunk_size=chunk,
        chunks=range(count),
        source=source,
        budget=budget,
        readahead=None,
    ) as store:
        expected = store.read_at(0, chunk)
        for _ in range(2):
            for index in range(count):
                for start in range(0, chunk, 1 << 16):
                    assert store.read_at(index * chunk + start, 4096) == expected[start : start + 4096]
                assert budget.resident_bytes <= 8 * chunk
            assert resident_file_bytes() - before <= 12 * chunk
        assert budget.mapped_bytes == count * chunk
        assert set(source.opens.values()) == {1}
    assert budget.resident_bytes == 0


def test_a_view_of_a_chunk_that_was_rested_is_still_right(tmp_path):
    budget = MappingBudget(max_resident_bytes=0)
    store, source = lazy_store(tmp_path / "s", 3, budget)
    with store:
        view = store.view(10, 100)
        for index in (1, 2, 0, 1):
            assert read_chunk(store, index) == source.content[index * CHUNK : (index + 1) * CHUNK]
        store.write_at(20, b"new")
        assert bytes(view) == source.content[10:110]
        assert store.read_at(19, 5) == source.content[19:20] + b"new" + source.content[23:24]


def test_stores_share_a_budget(tmp_path):
    budget = MappingBudget(4 * CHUNK)
    stores = [lazy_store(tmp_path / str(number), 4, budget)[0] for number in range(3)]
    for store in stores:
        store.read_at(0, store.size)
    assert budget.mapped_bytes == 4 * CHUNK
    assert stores[0].statistics().mapped_bytes == 0
    for store in stores:
        store.close()
    assert budget.mapped_bytes == 0


def test_a_view_keeps_its_chunk_mapped_beyond_budget_and_store(tmp_path):
    budget = MappingBudget(0)
    store, source = lazy_store(tmp_path / "s", 3, budget)
    view = store.view(CHUNK + 10, 100)
    part = view[20:30]
    assert budget.mapped_bytes == CHUNK
    assert not view.flags.writeable
    read_chunk(store, 1)
    assert source.opens[1] == 1
    store.close()
    assert bytes(view) == source.content[CHUNK + 10 : CHUNK + 110]
    del view
    gc.collect()
    assert bytes(part) == source.content[CHUNK + 30 : CHUNK + 40]
    assert budget.mapped_bytes == CHUNK
    del part
    gc.collect()
    assert budget.mapped_bytes == 0


def test_views_die_in_any_thread(tmp_path):
    budget = MappingBudget(4 * CHUNK, max_resident_bytes=2 * CHUNK)
    store, source = lazy_store(tmp_path / "s", 8, budget)
    barrier = threading.Barrier(4)
    wrong: list[int] = []

    def work(seed):
        barrier.wait(300)
        generator = np.random.default_rng(seed)
        for _ in range(300):
            index = int(generator.integers(8))
            view = store.view(index * CHUNK, CHUNK)
            if view[5] != source.content[index * CHUNK + 5]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    store.close()
    gc.collect()
    assert not wrong
    assert budget.mapped_bytes == 0


def test_mappings_keep_no_descriptors(tmp_path):
    before = open_files()
    store, _ = lazy_store(tmp_path / "s", 500, MappingBudget(), chunk_size=4096)
    with store:
        store.read_at(0, store.size)
        assert store.statistics().mapped_bytes == 500 * 4096
        assert open_files() <= before + 1
    assert open_files() == before


def test_files_open_for_writing_are_bounded(tmp_path):
    budget = MappingBudget(max_descriptors=5)
    before = open_files()
    with COWStore(tmp_path / "s", size=100 * 4096, chunk_size=4096, budget=budget) as store:
        for index in [*range(100), *range(100)]:
            store.write_at(index * 4096 + 1, b"x")
            assert open_files() <= before + 6
        assert budget.open_descriptors == 5
        assert store.read_at(1, 99 * 4096 + 1)[::4096] == b"x" * 100
    assert open_files() == before
    assert budget.open_descriptors == 0


def test_a_store_that_is_forgotten_leaks_no_descriptor(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * CHUNK)
    before = open_files()
    store = COWStore.from_file(tmp_path / "file", tmp_path / "s", CHUNK, copy=False)
    store.read_at(0, 1)
    del store
    gc.collect()
    assert open_files() == before


def test_when_the_process_may_map_no_more_the_budget_makes_room(tmp_path, monkeypatch):
    budget = MappingBudget()
    store, source = lazy_store(tmp_path / "s", 4, budget)
    real = mapping._mmap
    room = 2

    def mmap(*arguments):
        if budget.mappings >= room:
            ctypes.set_errno(errno.ENOMEM)
            return mapping._MAP_FAILED
        return real(*arguments)

    monkeypatch.setattr(mapping, "_mmap", mmap)
    with store:
        for index in (0, 1, 2, 3, 0):
            assert read_chunk(store, index) == source.content[index * CHUNK : (index + 1) * CHUNK]
        store.write_at(0, b"x")
        assert read_chunk(store, 0) == b"x" + source.content[1:CHUNK]
        views = [store.view(0, 1), store.view(CHUNK, 1)]
        with pytest.raises(OSError, match=r"cannot map chunk 2 .*Cannot allocate memory"):
            store.read_at(2 * CHUNK, 1)
        del views
        assert store.read_at(2 * CHUNK, 1) == source.content[2 * CHUNK : 2 * CHUNK + 1]


def test_a_forked_child_has_a_budget_of_its_own(tmp_path):
    budget = default_budget()
    with budget._maps._lock:
        child = os.fork()
        if not child:
            try:
                with COWStore(tmp_path / "child", size=CHUNK, chunk_size=CHUNK) as store:
                    store.write_at(0, b"x")
                    ok = store.read_at(0, 1) == b"x" and default_budget() is not budget
            except BaseException:
                ok = False
            os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_checkpoint_closes_the_files_it_freezes(tmp_path):
    budget = MappingBudget()
    with COWStore(tmp_path / "s", size=4 * CHUNK, chunk_size=CHUNK, budget=budget) as store:
        store.write_at(0, b"x" * (4 * CHUNK))
        assert budget.open_descriptors == 4
        with store.checkpoint():
            assert budget.open_descriptors == 0


def test_a_forked_child_does_not_keep_the_folder_of_a_closed_store(tmp_path):
    store = COWStore(tmp_path / "s", size=CHUNK, chunk_size=CHUNK)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    try:
        (tmp_path / "s" / "keeps the folder").touch()
        store.close()
        COWStore(tmp_path / "s", size=CHUNK, chunk_size=CHUNK).close()
    finally:
        os.close(writing)
        os.close(reading)
        assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_does_not_remove_its_parents_files(tmp_path):
    with COWStore(tmp_path / "s", size=CHUNK, chunk_size=CHUNK) as store:
        store.write_at(0, b"x")
        child = os.fork()
        if not child:
            store.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert store.read_at(0, 1) == b"x"
        assert len(os.listdir(tmp_path / "s")) == 1
