"""The store against a bytearray: random operations, alone and by many threads."""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import threading

import numpy as np
import pytest
from cow_sources import MemorySource, open_files, pattern, read_chunk, wait_until
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cow import COWStore, MappingBudget

CHUNK = 8192
PATIENCE = 60


def initial(size, seed):
    """Some chunks random, some zero, some half and half."""
    content = bytearray(pattern(size, seed))
    for index in range(0, size // CHUNK + 1, 3):
        content[index * CHUNK : (index + 1) * CHUNK] = bytes(
            len(content[index * CHUNK : (index + 1) * CHUNK])
        )
    content[CHUNK : CHUNK + 5000] = bytes(len(content[CHUNK : CHUNK + 5000]))
    return content


def open_store(kind, folder, content, budget):
    path = os.path.join(folder, "file")
    with open(path, "wb") as file:
        file.write(content)
    data_dir = os.path.join(folder, "store")
    if kind == "empty":
        content[:] = bytes(len(content))
        return COWStore(data_dir, size=len(content), chunk_size=CHUNK, budget=budget)
    if kind == "lazy":
        present = [i for i in range(-(-len(content) // CHUNK)) if any(content[i * CHUNK : (i + 1) * CHUNK])]
        source = MemorySource(bytes(content), CHUNK)
        return COWStore(
            data_dir, size=len(content), chunk_size=CHUNK, chunks=present, source=source, budget=budget
        )
    return COWStore.from_file(path, data_dir, CHUNK, copy=kind == "copy", budget=budget)


OFFSETS = st.floats(0, 1, exclude_max=True)
LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([4096, CHUNK, 2 * CHUNK]), st.integers(1, 3 * CHUNK))


class StoreMachine(RuleBasedStateMachine):
    """Every operation, with a budget of two chunks, against a bytearray."""

    @initialize(
        kind=st.sampled_from(["empty", "lazy", "copy", "base"]),
        size=st.integers(0, 9 * CHUNK),
        descriptors=st.integers(0, 3),
    )
    def begin(self, kind, size, descriptors):
        self.folder = tempfile.mkdtemp(prefix="cow-model-")
        self.content = initial(size, 1)
        self.budget = MappingBudget(2 * CHUNK, max_descriptors=descriptors, max_resident_bytes=CHUNK)
        self.store = open_store(kind, self.folder, self.content, self.budget)
        self.unsaved = set() if kind in ("empty", "lazy") else None
        self.dirty: set[int] = set()
        self.dirty_before: set[int] = set()
        self.checkpoint = None
        self.links: list[tuple[str, bytes]] = []

    def place(self, offset, length):
        start = int(offset * len(self.content))
        return start, min(length, len(self.content) - start)

    def note(self, start, data):
        """A chunk is dirty when it was written, except zeros into a hole."""
        for index in range(start // CHUNK, -(-(start + len(data)) // CHUNK)):
            part = data[max(0, index * CHUNK - start) : max(0, (index + 1) * CHUNK - start)]
            if part and not (self.store.is_hole(index) and not any(part)):
                self.dirty.add(index)

    @rule(offset=OFFSETS, length=LENGTHS, seed=st.integers(0, 3))
    def write(self, offset, length, seed):
        start, length = self.place(offset, length)
        data = pattern(length, seed) if seed else bytes(length)
        self.note(start, data)
        assert self.store.write_at(start, data) == length
        self.content[start : start + length] = data

    @rule(offset=OFFSETS, seed=st.integers(0, 3))
    def write_chunks(self, offset, seed):
        index = int(offset * len(self.content)) // CHUNK
        start, length = index * CHUNK, min(CHUNK, len(self.content) - index * CHUNK)
        data = pattern(length, seed) if seed else bytes(length)
        self.note(start, data)
        self.store.write_at(start, data)
        self.content[start : start + length] = data

    @rule(offset=OFFSETS, length=LENGTHS, how=st.integers(0, 2))
    def read(self, offset, length, how):
        start, length = self.place(offset, length)
        expected = self.content[start : start + length]
        if how == 0:
            assert self.store.read_at(start, length) == expected
        elif how == 1:
            assert self.store.view(start, length).tobytes() == expected
        else:
            buffer = bytearray(length)
            self.store.readinto_at(start, buffer)
            assert buffer == expected

    @rule(more=st.one_of(st.integers(0, 200), st.integers(0, 3 * CHUNK)))
    def grow(self, more):
        if len(self.content) > 30 * CHUNK:
            return
        last, short = divmod(len(self.content), CHUNK)
        if more and short and not self.store.is_hole(last):
            self.dirty.add(last)
        self.store.resize(len(self.content) + more)
        self.content += bytes(more)

    @precondition(lambda self: self.checkpoint is None)
    @rule()
    def begin_checkpoint(self):
        self.checkpoint = self.store.checkpoint()
        self.moment = bytes(self.content)
        self.dirty_before, self.dirty = self.dirty, set()
        if self.unsaved is not None:
            assert set(self.checkpoint.chunks.tolist()) == self.unsaved | self.dirty_before
        assert self.dirty_before <= set(self.checkpoint.chunks.tolist())

    @precondition(lambda self: self.checkpoint is not None)
    @rule(link=st.booleans())
    def read_checkpoint(self, link):
        buffer = bytearray(CHUNK)
        for index in range(self.checkpoint.chunk_count):
            length = self.checkpoint.readinto(index, buffer)
            expected = self.moment[index * CHUNK : (index + 1) * CHUNK]
            assert buffer[:length] == expected
            assert not self.checkpoint.is_hole(index) or not any(expected)
            path = self.checkpoint.path(index)
            if link and path is not None and len(self.links) < 50:
                name = os.path.join(self.folder, f"link{len(self.links)}")
                os.link(path, name)
                self.links.append((name, expected))

    @precondition(lambda self: self.checkpoint is not None)
    @rule(replace=st.booleans())
    def commit(self, replace):
        self.checkpoint.commit(MemorySource(self.moment, CHUNK) if replace else None)
        self.checkpoint = None
        self.unsaved = set()

    @precondition(lambda self: self.checkpoint is not None)
    @rule()
    def release(self):
        if self.unsaved is not None:
            self.unsaved |= self.dirty_before
        self.checkpoint.release()
        self.checkpoint = None
        self.dirty |= self.dirty_before

    @rule()
    def export(self):
        path = os.path.join(self.folder, "out")
        self.store.export(path)
        with open(path, "rb") as file:
            assert file.read() == self.content

    @rule()
    def sync(self):
        self.store.sync()

    @invariant()
    def dirty_and_bounds_agree(self):
        if not hasattr(self, "store"):
            return
        expected = self.dirty | (self.dirty_before if self.checkpoint else set())
        assert set(self.store.dirty_chunks.tolist()) == expected
        assert self.store.size == len(self.content)
        assert self.budget.mapped_bytes <= 2 * CHUNK
        for name, linked in self.links:
            with open(name, "rb") as file:
                assert file.read() == linked

    def teardown(self):
        if not hasattr(self, "store"):
            return
        assert self.store.read_at(0, len(self.content)) == self.content
        if self.checkpoint is None:
            kept = {int(name.partition(".")[0]) for name in os.listdir(self.store.data_dir)}
            assert len(os.listdir(self.store.data_dir)) == len(kept) == self.store.statistics().private_chunks
        self.store.close()
        gc.collect()
        assert self.budget.mapped_bytes == self.budget.open_descriptors == 0
        assert not os.path.exists(os.path.join(self.folder, "store"))
        shutil.rmtree(self.folder)


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestStoreAgainstABytearray = pytest.mark.slow(StoreMachine.TestCase)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lazy", "copy", "base", "empty"])
def test_ten_thousand_random_operations_under_a_small_budget_end_at_zero(tmp_path, kind):
    generator = random.Random(f"ten thousand {kind}")
    before = open_files()
    budget = MappingBudget(4 * CHUNK, max_descriptors=4, max_resident_bytes=2 * CHUNK)
    content = initial(60 * CHUNK + 500, 2)
    with open_store(kind, str(tmp_path), content, budget) as store:
        for _ in range(10_000 if kind == "lazy" else 2_000):
            offset = generator.randrange(len(content))
            length = min(generator.choice([1, 100, 4096, CHUNK, 20_000]), len(content) - offset)
            action = generator.random()
            if action < 0.4:
                data = generator.randbytes(length)
                store.write_at(offset, data)
                content[offset : offset + length] = data
            elif action < 0.7:
                assert store.read_at(offset, length) == content[offset : offset + length]
            elif action < 0.99:
                assert store.view(offset, length).tobytes() == content[offset : offset + length]
            else:
                with store.checkpoint() as checkpoint:
                    if generator.random() < 0.5:
                        checkpoint.commit()
            assert budget.mapped_bytes <= 4 * CHUNK
            assert budget.open_descriptors <= 4
        assert store.read_at(0, len(content)) == content
    gc.collect()
    assert budget.mapped_bytes == budget.mappings == budget.open_descriptors == 0
    assert open_files() == before


class Crowd:
    """Writers that stamp pages of their own with rising numbers, readers that watch, and a saver."""

    PAGES = 80
    WRITERS = READERS = 20
    STAMPS = 24

    def __init__(self, store):
        self.store = store
        self.errors: list[object] = []
        self.final = [1] * self.PAGES
        self.barrier = threading.Barrier(self.WRITERS + self.READERS + 1)
        self.finished = threading.Event()

    def run(self):
        writers = [self.thread(self.write, number) for number in range(self.WRITERS)]
        others = [self.thread(self.read, number) for number in range(self.READERS)]
        others.append(self.thread(self.save))
        for thread in writers + others:
            thread.start()
        for thread in writers:
            thread.join(PATIENCE)
        self.finished.set()
        for thread in writers + others:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        assert not self.errors, self.errors[:5]

    def thread(self, work, *arguments):
        def guarded():
            try:
                self.barrier.wait(PATIENCE)
                work(*arguments)
            except BaseException as error:
                self.errors.append(error)

        return threading.Thread(target=guarded)

    def write(self, writer):
        generator = random.Random(writer)
        for number in range(2, 2 + self.STAMPS):
            page = writer + self.WRITERS * generator.randrange(self.PAGES // self.WRITERS)
            self.store.write_at(page * 4096, np.full(512, number, np.uint64))
            self.final[page] = number
            words = np.frombuffer(self.store.read_at(page * 4096, 4096), np.uint64)
            assert (words == number).all(), "a writer does not see its own stamp"

    def read(self, reader):
        generator = random.Random(1000 + reader)
        seen = np.zeros((self.PAGES, 512), np.uint64)
        while not self.finished.is_set():
            page = generator.randrange(self.PAGES)
            words = np.frombuffer(self.store.read_at(page * 4096, 4096), np.uint64)
            assert (words >= seen[page]).all(), "a page went back in time"
            seen[page] = words

    def save(self):
        buffer = bytearray(CHUNK)
        while not self.finished.is_set():
            with self.store.checkpoint() as moment:
                chunks = range(moment.chunk_count)
                first = [bytes(buffer[: moment.readinto(index, buffer)]) for index in chunks]
                again = [bytes(buffer[: moment.readinto(index, buffer)]) for index in chunks]
                assert first == again, "a checkpoint changed"
                pages = np.frombuffer(b"".join(first), np.uint64).reshape(self.PAGES, 512)
                assert (pages == pages[:, :1]).all(), "a checkpoint has half a write"
                moment.commit()


@pytest.mark.parametrize("kind", ["lazy", "base", "copy"])
def test_twenty_readers_and_twenty_writers_agree_with_a_model(tmp_path, kind):
    content = bytearray(np.ones(Crowd.PAGES * 512, np.uint64).tobytes())
    budget = MappingBudget(3 * CHUNK, max_descriptors=3, max_resident_bytes=CHUNK)
    with open_store(kind, str(tmp_path), content, budget) as store:
        crowd = Crowd(store)
        crowd.run()
        words = np.frombuffer(store.read_at(0, len(content)), np.uint64).reshape(Crowd.PAGES, 512)
        assert (words == np.array(crowd.final, np.uint64)[:, None]).all()
    gc.collect()
    assert budget.mapped_bytes == budget.open_descriptors == 0


def test_closing_waits_for_what_is_in_progress(tmp_path):
    content = pattern(2 * CHUNK)
    source = MemorySource(content, CHUNK)
    begun, release = threading.Event(), threading.Event()

    def wait(index):
        begun.set()
        assert release.wait(PATIENCE)

    source.before_open = wait
    budget = MappingBudget()
    store = COWStore(
        tmp_path / "s", size=2 * CHUNK, chunk_size=CHUNK, chunks=[0, 1], source=source, budget=budget
    )
    results: list[bytes] = []
    reader = threading.Thread(target=lambda: results.append(read_chunk(store, 0)))
    reader.start()
    assert begun.wait(PATIENCE)
    closer = threading.Thread(target=store.close)
    closer.start()
    wait_until(lambda: store.closed)
    assert closer.is_alive()
    release.set()
    reader.join(PATIENCE)
    closer.join(PATIENCE)
    assert results == [content[:CHUNK]]
    assert budget.mapped_bytes == 0
