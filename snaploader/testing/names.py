"""ByteStream resource names, as the server reads them (REAPI, ContentAddressableStorage)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument

_NAME = re.compile(
    r"(?:(?P<instance>.+?)/)??"
    r"(?:uploads/(?P<upload>[^/]+)/)?"
    r"(?:blobs|compressed-blobs/(?P<compressor>[^/]+))/"
    r"(?:(?P<function>[a-z][a-z0-9]*)/)?"
    r"(?P<hash>[0-9a-f]{64})/(?P<size>[0-9]{1,16})"
    r"(?P<rest>/.*)?",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class ResourceName:
    """What a resource name says."""

    instance_name: str
    digest: Digest
    is_compressed: bool
    """Whether the bytes on the wire are zstd."""
    is_upload: bool


def parse_resource_name(name: str) -> ResourceName:
    """Read a name. InvalidArgument when it is malformed.

    A name without a function is one of SHA-256, which must not be spelled out: the specification says so,
    and servers refuse it.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgument(f"the resource name {name[:200]!r} is malformed")
    if match["rest"] is not None and match["upload"] is None:
        raise InvalidArgument(f"the resource name {name[:200]!r} has something after the size")
    compressor = match["compressor"]
    if compressor not in (None, "zstd"):
        raise InvalidArgument(f"the compressor {compressor!r} is not supported")
    function = DigestFunction.SHA256
    if match["function"] is not None:
        if match["function"] != "blake3":
            raise InvalidArgument(
                f"the digest function {match['function']!r} may not stand in a resource name"
            )
        function = DigestFunction.BLAKE3
    return ResourceName(
        instance_name=match["instance"] or "",
        digest=Digest.checked(match["hash"], int(match["size"]), function),
        is_compressed=compressor is not None,
        is_upload=match["upload"] is not None,
    )
