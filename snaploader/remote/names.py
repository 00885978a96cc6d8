"""Resource names of ByteStream (REAPI, ContentAddressableStorage: "the resource name pattern")."""

from __future__ import annotations

import uuid

from snaploader.digest import Digest


def read_name(instance_name: str, digest: Digest, *, zstd: bool = False) -> str:
    """Under which a blob is read; with `zstd`, its compressed form."""
    return _join(instance_name, _blob(digest, zstd=zstd))


def upload_name(instance_name: str, digest: Digest, *, zstd: bool = False) -> str:
    """Under which a blob is written. A new name at every call: it identifies one upload."""
    return _join(instance_name, f"uploads/{uuid.uuid4()}/{_blob(digest, zstd=zstd)}")


def _blob(digest: Digest, *, zstd: bool) -> str:
    kind = "compressed-blobs/zstd" if zstd else "blobs"
    return f"{kind}/{digest.function.resource_name_part}{digest.hash}/{digest.size_bytes}"


def _join(instance_name: str, name: str) -> str:
    return f"{instance_name}/{name}" if instance_name else name


_RESERVED = frozenset(
    ("blobs", "uploads", "actions", "actionResults", "operations", "capabilities", "compressed-blobs")
)


def instance_name_error(instance_name: str) -> str | None:
    """What is wrong with an instance name by the REAPI's rules; None when it is fine."""
    parts = instance_name.split("/") if instance_name else []
    if any(not part or not part.isprintable() for part in parts):
        return "has empty or unprintable parts"
    reserved = _RESERVED.intersection(parts)
    return f"contains the reserved part {min(reserved)!r}" if reserved else None
