"""Digests: the name of a blob is the hash of its bytes, and its size.

Both functions offered have 256 bits, so a hash is 64 lower-case hexadecimal digits everywhere.
SHA-256 is what every Remote Execution API server speaks; BLAKE3 is several times faster and used
where a server offers it.
"""

from __future__ import annotations

import enum
import hashlib
import re
from typing import NamedTuple, Protocol, TypeAlias, cast

import blake3

from snaploader.errors import InvalidArgument

Buffer: TypeAlias = "bytes | bytearray | memoryview"

HASH_BYTES = 32
"""Length of every hash, in bytes."""

MAX_BLOB_BYTES = 1 << 50
"""Sizes above this come from broken or hostile input and are refused."""

_HEX = re.compile(r"[0-9a-f]{64}")


class Hasher(Protocol):
    """An incremental hash, as hashlib's."""

    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class DigestFunction(enum.IntEnum):
    """The hash behind a digest. Values are those of the REAPI enum DigestFunction.Value."""

    SHA256 = 1
    BLAKE3 = 9

    def hasher(self) -> Hasher:
        """A new incremental hash."""
        return hashlib.sha256() if self is DigestFunction.SHA256 else cast("Hasher", blake3.blake3())

    def hash(self, data: Buffer) -> str:
        """The hash of `data`, in hexadecimal. Releases the GIL for all but tiny inputs."""
        if self is DigestFunction.SHA256:
            return hashlib.sha256(data).hexdigest()
        return blake3.blake3(data).hexdigest()

    @property
    def resource_name_part(self) -> str:
        """What ByteStream resource names say of this function: nothing for SHA-256 (REAPI, ByteStream)."""
        return "" if self is DigestFunction.SHA256 else self.name.lower() + "/"

    @classmethod
    def parse(cls, name: str) -> DigestFunction:
        """The function called `name` ("sha256", "BLAKE3", "sha-256"). InvalidArgument for any other."""
        try:
            return cls[name.upper().replace("-", "")]
        except KeyError:
            raise InvalidArgument(f"unknown digest function {name!r}: use sha256 or blake3") from None


class Digest(NamedTuple):
    """The name of a blob. Immutable, hashable and ordered; two are equal when all three fields are."""

    hash: str
    """64 lower-case hexadecimal digits."""
    size_bytes: int
    function: DigestFunction = DigestFunction.SHA256

    @classmethod
    def of(cls, data: Buffer, function: DigestFunction) -> Digest:
        """The digest of `data`."""
        return cls(function.hash(data), len(memoryview(data).cast("B")), function)

    @classmethod
    def checked(cls, hash_: str, size_bytes: int, function: DigestFunction) -> Digest:
        """A digest from outside: InvalidArgument unless well formed."""
        if not _HEX.fullmatch(hash_):
            raise InvalidArgument(f"digest hash {hash_[:80]!r} is not 64 lower-case hexadecimal digits")
        if not 0 <= size_bytes <= MAX_BLOB_BYTES:
            raise InvalidArgument(f"digest size {size_bytes} of {hash_} is out of range")
        return cls(hash_, size_bytes, function)

    @classmethod
    def parse(cls, text: str, function: DigestFunction = DigestFunction.SHA256) -> Digest:
        """The digest written as `hash/size`. InvalidArgument when it is not."""
        hash_, _, size = text.partition("/")
        if not size.isdecimal() or len(size) > 16:
            raise InvalidArgument(f"digest {text[:100]!r} is not written as hash/size")
        return cls.checked(hash_, int(size), function)

    def __str__(self) -> str:
        return f"{self.hash}/{self.size_bytes}"


def empty_digest(function: DigestFunction) -> Digest:
    """The digest of no bytes. The empty blob exists everywhere and is never uploaded or fetched."""
    return Digest(function.hash(b""), 0, function)


def hash_strings(*parts: str) -> str:
    """SHA-256 of the concatenated hexadecimal SHA-256 hashes of `parts`, in hexadecimal.

    Hashing each part first keeps ("ab", "c") and ("a", "bc") apart.
    """
    inner = "".join(hashlib.sha256(part.encode()).hexdigest() for part in parts)
    return hashlib.sha256(inner.encode()).hexdigest()
