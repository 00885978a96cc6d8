"""Many hashes at once, as numpy arrays: 32 bytes each instead of a Python string each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt

from snaploader.digest import Digest
from snaploader.formats.digests import decode_hashes

Words: TypeAlias = "npt.NDArray[np.uint64]"
"""Hashes as rows of four words, most significant first."""

Prefixes: TypeAlias = "npt.NDArray[np.uint64]"
"""First eight bytes of hashes, where a chance collision does no harm."""


def to_words(hashes: Sequence[str]) -> Words:
    """Convert hashes in hexadecimal to an array of shape (n, 4). InvalidArgument when one is malformed."""
    return to_rows(decode_hashes(hashes))


def to_rows(hashes: npt.NDArray[np.uint8]) -> Words:
    """Convert hashes that are rows of 32 bytes to an array of shape (n, 4)."""
    return np.ascontiguousarray(hashes).view(">u8").astype(np.uint64)


def to_prefixes(hashes: npt.NDArray[np.uint8]) -> Prefixes:
    """Return the prefixes of hashes that are rows of 32 bytes."""
    return np.ascontiguousarray(hashes[:, :8]).view(">u8")[:, 0].astype(np.uint64)


def are_among(prefixes: Prefixes, known: Prefixes) -> npt.NDArray[np.bool_]:
    """Tell of each whether it is among `known`, which is sorted. A few are found without a look at all."""
    places = np.searchsorted(known, prefixes)
    found = places < len(known)
    found[found] = known[places[found]] == prefixes[found]
    return found


def distinct(prefixes: Prefixes) -> Prefixes:
    """Return each of them once, sorted. (`np.unique` imports `numpy.ma` first, which takes some 15 ms.)"""
    ordered = np.sort(prefixes)
    is_first = np.ones(len(ordered), dtype=np.bool_)
    is_first[1:] = ordered[1:] != ordered[:-1]
    return ordered[is_first]


def to_hex(words: Words) -> str:
    """Return the hash of one row in hexadecimal."""
    return words.astype(">u8").tobytes().hex()


class HashSet:
    """An immutable set of hashes, 32 bytes each, that answers for many at once; equal to a set of digests."""

    def __init__(self, words: Words) -> None:
        self._words = words[np.argsort(words[:, 0], kind="stable")]
        self._first = np.ascontiguousarray(self._words[:, 0])

    @classmethod
    def of(cls, digests: Iterable[Digest] = ()) -> Self:
        """Make the set of the hashes of distinct blobs. No object is held for each, however many they are."""
        rows = bytearray()
        for digest in digests:
            rows += bytes.fromhex(digest.hash)
        return cls(np.frombuffer(rows, dtype=">u8").reshape(-1, 4).astype(np.uint64))

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, digest: Digest) -> bool:
        return bool(self.contains(to_words([digest.hash]))[0])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, frozenset | set):
            other = HashSet.of(other)
        if not isinstance(other, HashSet):
            return NotImplemented
        return len(self) == len(other) and bool(self.contains(other._words).all())

    __hash__ = None  # type: ignore[assignment]

    def others(self, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return those of `hashes`, rows of 32 bytes, that are not in the set."""
        return hashes[~self.contains(to_rows(hashes))]

    def contains(self, words: Words) -> npt.NDArray[np.bool_]:
        """Tell of each row whether it is in the set. Whole hashes are compared."""
        found = np.zeros(len(words), dtype=np.bool_)
        rows = np.arange(len(words))
        places = np.searchsorted(self._first, words[:, 0], side="left")
        # One round finds all, unless two hashes of the set begin with the same eight bytes.
        while True:
            near = places < len(self._first)
            rows, places = rows[near], places[near]
            near = self._first[places] == words[rows, 0]
            rows, places = rows[near], places[near]
            if not len(rows):
                return found
            equal = (self._words[places] == words[rows]).all(axis=1)
            found[rows[equal]] = True
            rows, places = rows[~equal], places[~equal] + 1
