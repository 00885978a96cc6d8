"""What the stores of a process keep mapped and open, and the bounds of it.

A mapping is shared and read-only, and keeps no descriptor. Python's own `mmap` holds a duplicate of it
(until 3.13), so that thousands of mapped chunks would use up the process's open files.

Who uses a mapping or an open file refers to it, and it goes, at once, with the last reference. So nothing is
unmapped under a reader, and uses need not be counted.

Mapped chunks have two bounds. Address space is cheap, and mapping a chunk again is not: its source has to
find and open its file. Resident memory is what operators watch and what hosts of many processes run out of.
So the chunks read least lately stay mapped, but their pages are taken out of the process's page table.
Reading one of them again costs a fault or two, as long as the page cache has it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Any, Generic, TypeVar

from cow.errors import COWError, TruncatedFile
from cow.fileio import PAGE_SIZE

_MAP_FAILED = ctypes.c_void_p(-1).value
_READ_ONLY = 0x100  # PyBUF_READ, and the next one PyBUF_WRITE, of object.h
_WRITABLE = 0x200

_address, _size, _int, _object = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.py_object
_libc = ctypes.CDLL(None)
_mmap = ctypes.CFUNCTYPE(
    _address, _address, ctypes.c_size_t, _int, _int, _int, ctypes.c_long, use_errno=True
)(("mmap", _libc))
_munmap = ctypes.CFUNCTYPE(_int, _address, ctypes.c_size_t)(("munmap", _libc))
# Some microseconds with the GIL: giving it away may cost a reader milliseconds when other threads compute.
_madvise = ctypes.PYFUNCTYPE(_int, _address, ctypes.c_size_t, _int)(("madvise", _libc))
_memory_at = ctypes.PYFUNCTYPE(_object, _address, _size, _int)(("PyMemoryView_FromMemory", ctypes.pythonapi))
_new_bytes = ctypes.PYFUNCTYPE(_object, _address, _size)(("PyBytes_FromStringAndSize", ctypes.pythonapi))
_bytes_address = ctypes.PYFUNCTYPE(_address, _object)(("PyBytes_AsString", ctypes.pythonapi))


def new_bytes(size: int) -> tuple[bytes, memoryview]:
    """A bytes object with any content, and the memory to fill it through before anybody else sees it.

    It saves filling it with zeros, or a second copy. The view must not outlive the object. `size` is not 0.
    """
    result: bytes = _new_bytes(None, size)
    memory: memoryview = _memory_at(_bytes_address(result), size, _WRITABLE)
    return result, memory


class Resource:
    """Something of the operating system that a cache gives back when nobody refers to it any more."""

    __slots__ = ("__weakref__", "active", "release", "used", "weight")

    def __init__(self, weight: int, release: Callable[[], object]) -> None:
        self.weight = weight
        """How much of a cache's `max_weight` it takes."""
        self.release = release
        """Called when this object is gone. Must not raise, nor refer to it."""
        self.used = False
        """Whether it was looked up since its cache last thought of resting it or letting go of it."""
        self.active = True
        """False from when its cache rested it until it is looked up."""

    def rest(self) -> None:
        """Give back what is had again for little. May come at any time, also while the resource is in use."""


class FileMapping(Resource):
    """A mapped part of a file. Weighs its bytes, in whole pages."""

    __slots__ = ("address", "length", "memory")

    def __init__(self, fd: int, offset: int, length: int, what: str) -> None:
        """Map `length` bytes at `offset`, a multiple of the page size. `what` is named in errors."""
        # Touching a page behind the end of a file kills the process.
        actual = os.fstat(fd).st_size
        if actual < offset + length:
            raise TruncatedFile(
                f"{what} has {actual} bytes where {offset + length} are needed: restore it and open it again"
            )
        address = _mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
        if address == _MAP_FAILED or address is None:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {what}: {os.strerror(number)}")
        super().__init__(-(-length // PAGE_SIZE) * PAGE_SIZE, partial(_munmap, address, length))
        self.address: int = address
        self.length = length
        self.memory: memoryview = _memory_at(address, length, _READ_ONLY)
        """Its bytes. To be used only while the mapping itself is referred to."""

    def slice(self, start: int, length: int) -> memoryview:
        if start + length > self.length:
            # A slice would be shorter than what its reader expects, so a broken invariant must end here.
            raise COWError(f"internal error: {length} bytes at {start} are not in a mapping of {self.length}")
        return self.memory[start : start + length]

    def rest(self) -> None:
        """Take its pages out of the resident memory of the process. Reading them brings them back."""
        # It fails for memory that is locked (mlockall), which is resident by the wish of its owner.
        _madvise(self.address, self.length, mmap.MADV_DONTNEED)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """For numpy, whose arrays refer to this object and so keep the mapping."""
        return {"shape": (self.length,), "typestr": "|u1", "data": (self.address, True), "version": 3}


class OpenFile(Resource):
    """An open file. Its descriptor is to be used only while the object itself is referred to."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        super().__init__(1, partial(_close, fd))
        self.fd = fd


def _close(fd: int) -> None:
    # An earlier write that only fails now is told by fsync(2), to those who ask whether it is on disk.
    with suppress(OSError):
        os.close(fd)


R = TypeVar("R", bound=Resource)


class _Held(weakref.ref[R]):
    """A resource in the books of a cache, which must not keep it alive.

    Not a `__del__` of the resource: while that runs, others could still get hold of the object through
    a weak reference. When a weak reference calls back, nobody can any more.
    """

    __slots__ = ("index", "part", "release", "weight")
    part: CachePart[R]
    index: int
    weight: int
    release: Callable[[], object]

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class ClockCache(Generic[R]):
    """Keeps resources alive, bounded in number and weight, by second chance (CLOCK). Thread-safe.

    Resources are active or at rest. Those that were not looked up lately are rested when the active ones
    weigh more than `max_active_weight`, and let go of, those at rest first, when there are too many or all of
    them weigh too much. Looking one up makes it active; if it is, that takes no lock. A resource that
    somebody else refers to stays alive nevertheless, is counted, and can be looked up.
    """

    def __init__(self, max_weight: int, max_entries: int, max_active_weight: int | None = None) -> None:
        self.max_weight = max_weight
        self.max_entries = max_entries
        self.max_active_weight = max_weight if max_active_weight is None else max_active_weight
        self._lock = threading.Lock()
        self._active: OrderedDict[R, None] = OrderedDict()
        """What the cache itself keeps alive and active, in the order of their next turn."""
        self._resting: OrderedDict[R, None] = OrderedDict()
        """What else it keeps alive, in the order in which it was rested."""
        self.active_weight = 0
        """Weight of what the cache keeps alive and active."""
        self._alive: set[_Held[R]] = set()
        self._weight = 0
        self._gone: deque[_Held[R]] = deque()
        """Given back, but not taken from the books yet."""

    @property
    def weight(self) -> int:
        """Weight of everything that is alive, whoever keeps it."""
        self._settle()
        return self._weight

    @property
    def count(self) -> int:
        """Number of resources alive, as for `weight`."""
        self._settle()
        return len(self._alive)

    def trim(self) -> None:
        """Let go of everything."""
        with self._lock:
            dropped = [*self._active, *self._resting]
            self._active.clear()
            self._resting.clear()
            self.active_weight = 0
        del dropped

    def _activate(self, resource: R) -> None:
        """Count a resource that is looked up as active again."""
        with self._lock:
            resource.active = True
            # It may have been let go of, now or long ago: then it is its users' own.
            if resource not in self._resting:
                return
            del self._resting[resource]
            self._active[resource] = None
            self.active_weight += resource.weight
            rested = self._rest_some()
        for each in rested:
            each.rest()

    def _take_out(self, resource: R) -> None:
        if resource in self._active:
            del self._active[resource]
            self.active_weight -= resource.weight
        else:
            self._resting.pop(resource, None)

    def _shrink(self) -> None:
        while True:
            with self._lock:
                self._strike()
                fits = self._weight <= self.max_weight and len(self._alive) <= self.max_entries
                if fits or not (self._resting or self._active):
                    rested = self._rest_some()
                    break
                victim = self._resting.popitem(last=False)[0] if self._resting else self._next_active()
            # It dies here, without the lock, unless somebody uses it: then the next one must go too.
            del victim
        for each in rested:
            each.rest()

    def _rest_some(self) -> list[R]:
        """Take the bound on active ones into account; returns whom to rest, without the lock."""
        rested = []
        while self.active_weight > self.max_active_weight:
            resource = self._next_active()
            resource.active = False
            self._resting[resource] = None
            rested.append(resource)
        return rested

    def _next_active(self) -> R:
        """Take out the active one whose turn it is. Those looked up since their last turn are passed over."""
        while True:
            resource = next(iter(self._active))
            if not resource.used:
                self._take_out(resource)
                return resource
            resource.used = False
            self._active.move_to_end(resource)

    def _on_gone(self, held: _Held[R]) -> None:
        # Any thread may come here at any moment, in the midst of the methods above too.
        held.release()
        self._gone.append(held)
        self._settle()

    def _settle(self) -> None:
        # Whoever has the lock strikes before it looks at the books, so a failed attempt loses nothing.
        while self._gone and self._lock.acquire(blocking=False):
            try:
                self._strike()
            finally:
                self._lock.release()

    def _strike(self) -> None:
        """Take what is gone from the books. The caller holds the lock."""
        while self._gone:
            held = self._gone.popleft()
            self._alive.discard(held)
            self._weight -= held.weight
            held.part._weight -= held.weight
            if held.part._held.get(held.index) is held:
                del held.part._held[held.index]


class CachePart(Generic[R]):
    """The part of a cache that belongs to one store: resources by the index of their chunk. Thread-safe."""

    def __init__(self, cache: ClockCache[R]) -> None:
        self.cache = cache
        self._held: dict[int, _Held[R]] = {}
        self._weight = 0

    @property
    def weight(self) -> int:
        """The part of the cache's `weight` that belongs here."""
        self.cache._settle()
        return self._weight

    def get(self, index: int) -> R | None:
        """The resource of a chunk, if there is one. It stays as long as the caller refers to it."""
        held = self._held.get(index)
        if held is None:
            return None
        resource = held()
        if resource is not None:
            if resource.active:
                resource.used = True
            else:
                self.cache._activate(resource)
        return resource

    def add(self, index: int, resource: R, *, findable: bool = True) -> R:
        """Take a resource into the books, and return it; it replaces the one of the same chunk.

        One that is not `findable` is only counted, until its users let go of it.
        """
        cache = self.cache
        held = _Held(resource, cache._on_gone)
        held.part, held.index, held.weight, held.release = self, index, resource.weight, resource.release
        with cache._lock:
            replaced = self._forget(index) if findable else None
            if findable:
                self._held[index] = held
                cache._active[resource] = None
                cache.active_weight += resource.weight
            cache._alive.add(held)
            cache._weight += held.weight
            self._weight += held.weight
        del replaced
        cache._shrink()
        return resource

    def discard(self, *indices: int) -> None:
        """Forget the resources of chunks. They are given back now, or by their last users."""
        with self.cache._lock:
            dropped = [self._forget(index) for index in indices]
        del dropped

    def clear(self) -> None:
        self.discard(*self._held)

    def _forget(self, index: int) -> R | None:
        """Take a resource out. The caller holds the lock, and drops the result when it does no more."""
        held = self._held.pop(index, None)
        resource = held() if held is not None else None
        if resource is not None:
            self.cache._take_out(resource)
        return resource


class MappingBudget:
    """Bounds for the mapped chunks and open files of all stores that share it. Thread-safe.

    Those not used lately are dropped first. A mapping in use, by a read in progress or an array returned by
    `view`, is never dropped, so what is in use may exceed the bounds.

    Args:
        max_bytes: Mapped bytes of address space, 4 GiB unless told. Beyond it, reading a chunk that was
            dropped asks its source to open it again.
        max_mappings: Number of mappings, 16,384 unless told; the kernel allows a process 65,530 by default.
        max_descriptors: Files kept open for writing; unless told, a quarter of what the process may open at
            this moment (RLIMIT_NOFILE), but at least 64 and at most 1,024.
        max_resident_bytes: Bytes of those mapped chunks whose pages may count in the process's resident
            memory, 256 MiB unless told. A chunk counts whole once it is read, because the kernel maps pages
            around the one that is touched. Beyond it, reading it again costs some page faults.
    """

    def __init__(
        self,
        max_bytes: int = 4 << 30,
        max_mappings: int = 16_384,
        max_descriptors: int | None = None,
        max_resident_bytes: int = 256 << 20,
    ) -> None:
        if max_descriptors is None:
            soft, _ = getrlimit(RLIMIT_NOFILE)
            max_descriptors = 1024 if soft == RLIM_INFINITY else min(max(soft // 4, 64), 1024)
        self.max_bytes = max_bytes
        self.max_mappings = max_mappings
        self.max_descriptors = max_descriptors
        self.max_resident_bytes = max_resident_bytes
        for name, value in vars(self).items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, not {value}")
        self._maps: ClockCache[FileMapping] = ClockCache(max_bytes, max_mappings, max_resident_bytes)
        self._files: ClockCache[OpenFile] = ClockCache(max_descriptors, max_descriptors)

    @property
    def mapped_bytes(self) -> int:
        """Bytes mapped now, whole pages."""
        return self._maps.weight

    @property
    def resident_bytes(self) -> int:
        """Bytes of the mapped chunks that may be resident now, whether all their pages are or not."""
        return self._maps.active_weight

    @property
    def mappings(self) -> int:
        """Mappings that exist now."""
        return self._maps.count

    @property
    def open_descriptors(self) -> int:
        """Files open for writing now."""
        return self._files.count

    def trim(self) -> None:
        """Drop every mapping and close every file that is not in use."""
        self._maps.trim()
        self._files.trim()


_default: MappingBudget | None = None
_default_lock = threading.Lock()


def default_budget() -> MappingBudget:
    """The budget of all stores that were not given one. One per process: a forked child has its own."""
    global _default
    with _default_lock:
        # Not made at import: programs raise their RLIMIT_NOFILE after it.
        _default = _default or MappingBudget()
        return _default


def _forget_default() -> None:
    # Another thread of the parent may have held one of the locks at the moment of the fork.
    global _default, _default_lock
    _default, _default_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_default)
