"""What a server can do, and what follows for how we talk to it."""

from __future__ import annotations

from dataclasses import dataclass

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import DigestFunction
from snaploader.errors import FailedPrecondition, Unimplemented

MESSAGE_LIMIT_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""gRPC's default message limit, less headroom for framing. Servers that state no limit have this one."""

_API_MAJOR = 2


@dataclass(frozen=True, slots=True)
class RemoteCapabilities:
    """What an endpoint and instance offer."""

    digest_functions: frozenset[DigestFunction] = frozenset((DigestFunction.SHA256,))
    """The functions offered, of those this library knows."""
    digest_function: DigestFunction = DigestFunction.SHA256
    """The one that is used."""
    zstd_streams: bool = False
    """Whether blobs may be streamed compressed, and batch reads may be answered so."""
    zstd_batch_updates: bool = False
    """Whether blobs may be uploaded compressed in a batch."""
    max_batch_bytes: int = 0
    """The batch limit as the server states it; 0 when it states none."""
    max_blob_bytes: int = 0
    """The biggest blob the server takes; 0 when it states none."""
    update_enabled: bool = True
    """Whether action results may be written."""
    api_version: str = ""
    """The newest API version the server speaks, such as "2.3"; "" when it does not say."""

    @property
    def message_limit_bytes(self) -> int:
        """The biggest request worth trying."""
        return min(self.max_batch_bytes or MESSAGE_LIMIT_BYTES, MESSAGE_LIMIT_BYTES)


def negotiate(
    server: reapi.ServerCapabilities, *, wanted: DigestFunction | None, compression: bool
) -> RemoteCapabilities:
    """Choose what to use of what a server offers; of digest functions only the one `wanted`, if any is.

    FailedPrecondition when the server is no cache or speaks another major version; Unimplemented when it
    lacks the digest function.
    """
    if not server.HasField("cache_capabilities"):
        raise FailedPrecondition(
            "the server offers execution only, no cache: use another endpoint or instance"
        )
    low, high = server.low_api_version, server.high_api_version
    if low.major > _API_MAJOR or 0 < high.major < _API_MAJOR:
        raise FailedPrecondition(
            f"the server speaks Remote Execution API {low.major}.{low.minor} to {high.major}.{high.minor};"
            f" version {_API_MAJOR} is needed"
        )
    cache = server.cache_capabilities
    named: set[int] = {*cache.digest_functions} or {DigestFunction.SHA256.value}
    offered = frozenset(function for function in DigestFunction if function.value in named)
    zstd = compression and reapi.Compressor.ZSTD in cache.supported_compressors
    return RemoteCapabilities(
        digest_functions=offered,
        digest_function=_choose(offered, wanted),
        zstd_streams=zstd,
        zstd_batch_updates=compression and reapi.Compressor.ZSTD in cache.supported_batch_update_compressors,
        max_batch_bytes=max(0, cache.max_batch_total_size_bytes),
        max_blob_bytes=max(0, cache.max_cas_blob_size_bytes),
        update_enabled=cache.action_cache_update_capabilities.update_enabled,
        api_version=f"{high.major}.{high.minor}" if high.major else "",
    )


def without_capabilities(wanted: DigestFunction | None) -> RemoteCapabilities:
    """Assume the least, of a server that has no Capabilities service."""
    offered = frozenset((DigestFunction.SHA256,))
    return RemoteCapabilities(digest_functions=offered, digest_function=_choose(offered, wanted))


def _choose(offered: frozenset[DigestFunction], wanted: DigestFunction | None) -> DigestFunction:
    if wanted is None:
        for function in (DigestFunction.BLAKE3, DigestFunction.SHA256):
            if function in offered:
                return function
        raise Unimplemented("the server offers neither SHA-256 nor BLAKE3 digests")
    if wanted not in offered:
        names = ", ".join(sorted(f.name for f in offered)) or "none known"
        raise Unimplemented(f"the server does not offer {wanted.name} digests (it offers {names})")
    return wanted
