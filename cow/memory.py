"""Read-only shared mappings of files that keep no descriptor.

Python's own `mmap` holds a duplicate of the descriptor (until 3.13), so that thousands of mapped
chunks would use up the process's open files. mmap(2) itself does not need it.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from cow.errors import TruncatedFile
from cow.geometry import PAGE_SIZE

_PROT_READ = 1
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_munmap = _libc.munmap
_munmap.restype = ctypes.c_int
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class RawArray:
    """What numpy needs to see memory at an address, read-only. The array keeps this object alive."""

    __slots__ = ("__array_interface__",)

    def __init__(self, address: int, length: int) -> None:
        self.__array_interface__: dict[str, Any] = {
            "shape": (length,),
            "typestr": "|u1",
            "data": (address, True),
            "version": 3,
        }


class Mapping:
    """A mapped part of a file. Whoever made it calls `unmap` once, when nobody reads it any more."""

    __slots__ = ("address", "array", "length", "mapped_bytes")

    def __init__(self, fd: int, offset: int, length: int, what: str) -> None:
        """Map `length` bytes at `offset` (a multiple of the page size).

        The size is checked first, because touching a page behind the end of a file kills the process:
        TruncatedFile, naming `what`, when it is too short.
        """
        actual = os.fstat(fd).st_size
        if actual < offset + length:
            raise TruncatedFile(
                f"{what} has {actual} bytes where {offset + length} are needed: restore it and open it again"
            )
        address = _mmap(None, length, _PROT_READ, _MAP_SHARED, fd, offset)
        if address == _MAP_FAILED or address is None:
            number = ctypes.get_errno()
            raise OSError(number, f"cannot map {what}: {os.strerror(number)}")
        self.address: int = address
        self.length = length
        self.mapped_bytes = -(-length // PAGE_SIZE) * PAGE_SIZE
        self.array: npt.NDArray[np.uint8] = np.asarray(RawArray(address, length))

    def unmap(self) -> None:
        """Give the address range back. Nothing may read it afterwards."""
        _munmap(self.address, self.length)
