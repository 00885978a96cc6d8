"""What the embedded server offers, demands and refuses; presets that mimic servers of the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import grpc

from snaploader.digest import DigestFunction
from snaploader.errors import InvalidArgument

DEFAULT_MESSAGE_BYTES = 4 * 1024 * 1024
"""gRPC's default bound of one message."""

_SHA256 = (DigestFunction.SHA256,)


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """Certificates of a server, PEM. With `client_ca`, clients must show a certificate it signed."""

    certificate: bytes
    private_key: bytes = field(repr=False)
    client_ca: bytes | None = None


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """The abilities and limits of an `EmbeddedServer`. The defaults are those of a full server."""

    digest_functions: tuple[DigestFunction, ...] = (DigestFunction.SHA256, DigestFunction.BLAKE3)
    """Functions offered, the preferred one first."""
    ignores_digest_function: bool = False
    """Take every digest for one of the first function, whatever the request says, as BuildGrid does."""
    zstd_streams: bool = True
    """Offer zstd for ByteStream (`compressed-blobs`)."""
    zstd_skippable_frame: bool = False
    """Begin what is compressed with a skippable frame (RFC 8878, 3.1.2), as bazel-remote does by default."""
    zstd_batches: bool = True
    """Offer zstd for BatchUpdateBlobs, and answer BatchReadBlobs with it where the client accepts it."""
    max_batch_total_size_bytes: int = DEFAULT_MESSAGE_BYTES - 64 * 1024
    """Stated in the capabilities; 0 states no limit, as many servers do that have one."""
    enforced_batch_bytes: int | None = None
    """Bytes of content accepted in one batch: None for what is stated, 0 for no bound but a message's."""
    max_message_bytes: int = DEFAULT_MESSAGE_BYTES
    """Bound of one message either way."""
    max_cas_blob_size_bytes: int = 0
    """Bigger blobs are refused; 0 for no bound."""
    update_enabled: bool = True
    """Whether clients may write to the action cache."""
    update_disabled_status: grpc.StatusCode = grpc.StatusCode.PERMISSION_DENIED
    """The answer to UpdateActionResult when they may not."""
    update_again_status: grpc.StatusCode | None = None
    """The answer to UpdateActionResult of a key that has a result, as of a write-once action cache
    (BuildGrid: INTERNAL). None replaces it."""
    max_action_results: int = 0
    """Action results kept in an instance; those that were written first go first. 0 for no bound."""
    read_only: bool = False
    """Refuse every write to the CAS with PERMISSION_DENIED."""
    capabilities: bool = True
    """Whether GetCapabilities is implemented."""
    query_write_status: bool = True
    """Whether QueryWriteStatus is implemented."""
    resumable_writes: bool = True
    """Keep what a broken write brought, so that it can be resumed at its offset."""
    early_return: bool = True
    """End a write at its first message when the blob exists."""
    zstd_read_offset: bool = True
    """Honour `read_offset` of compressed reads; False serves them from the start, as Buildbarn does."""
    read_limit_status: grpc.StatusCode | None = None
    """The answer to a `read_limit`, as some servers refuse it. None honours it. A compressed read with a
    limit is INVALID_ARGUMENT in any case (REAPI, ContentAddressableStorage)."""
    beyond_end_status: grpc.StatusCode = grpc.StatusCode.OUT_OF_RANGE
    """The answer to a `read_offset` beyond the end of the blob."""
    get_tree: bool = True
    """Whether GetTree is implemented."""
    compressed_committed_size: Literal["compressed", "uncompressed", "minus-one"] = "compressed"
    """What `committed_size` says after a compressed write."""
    read_chunk_bytes: int = 256 * 1024
    """Content in one ReadResponse. A client that does not read costs three to four times as much memory."""
    stream_idle_s: float = 60.0
    """How long Read, GetTree and Write wait for a client that reads or sends nothing. Then the call ends with
    DEADLINE_EXCEEDED and its upload counts as broken, and it no longer counts for `max_streams`. gRPC itself
    keeps the one piece that it could not send, twice (`read_chunk_bytes`), until the client reads on, or its
    connection ends."""
    max_streams: int = 256
    """Read and Write calls at once; more are refused with RESOURCE_EXHAUSTED and told when to come back."""
    max_connection_calls: int = 512
    """Calls at once of one connection, those included whose client does not read the end. Clients keep
    further ones back until one is over."""
    max_connection_age_s: float = 1800.0
    """When a connection gets no more calls; clients open a new one without an error. gRPC varies it by a
    tenth."""
    max_connection_grace_s: float = 600.0
    """What calls then get to end before the connection is closed, so that no client holds memory for ever.
    Calls that are cut are UNAVAILABLE; reads and writes can be resumed."""
    max_upload_memory_bytes: int = 1024 * 1024 * 1024
    """Memory for the content of open uploads, broken ones included: up to 5 MiB each, or all of it where
    content is kept in memory. Broken ones give way; then further ones are refused with RESOURCE_EXHAUSTED and
    told when to come back. One upload is taken at any size."""
    verify_writes: bool = True
    """Refuse bytes whose hash is not that of the digest; False compares sizes only."""
    batch_hash_function: DigestFunction | None = None
    """Hash the blobs of BatchUpdateBlobs with this function, whatever the request says; None obeys it."""
    verify_reads: bool = False
    """Hash what is read; delete a blob whose bytes are wrong and answer DATA_LOSS (batch: NOT_FOUND)."""
    instance_names: frozenset[str] | None = None
    """Instances served, each with content of its own. None serves any name."""
    unknown_instance_status: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT
    """The answer to other instances."""
    bearer_token: str | None = field(default=None, repr=False)
    """Demand `authorization: Bearer TOKEN`; UNAUTHENTICATED without."""
    required_headers: Mapping[str, str] = field(default_factory=dict)
    """Demand these headers (lower-case names); UNAUTHENTICATED without."""
    result_key_has_size: bool = True
    """Whether an action result is found under hash and size, or under the hash alone."""
    check_completeness: bool = True
    """GetActionResult answers NOT_FOUND when a blob that the result names is gone."""
    empty_result_not_found: bool = False
    """Answer NOT_FOUND to a stored ActionResult without content, as casd does."""
    api_version: tuple[int, int] = (2, 3)
    """The highest version of the API stated."""

    def __post_init__(self) -> None:
        if not self.digest_functions:
            raise InvalidArgument("digest_functions is empty: offer at least one")
        if self.max_message_bytes < 64 * 1024:
            raise InvalidArgument("max_message_bytes is below 64 KiB, where not even a request fits")
        if not 0 < self.read_chunk_bytes <= self.max_message_bytes - 1024:
            raise InvalidArgument("read_chunk_bytes does not fit in max_message_bytes")
        if self.stream_idle_s <= 0 or self.max_streams < 1 or self.max_upload_memory_bytes < 1:
            raise InvalidArgument("stream_idle_s, max_streams and max_upload_memory_bytes must be above 0")
        if min(self.max_connection_calls, self.max_connection_age_s, self.max_connection_grace_s) <= 0:
            raise InvalidArgument("max_connection_calls, _age_s and _grace_s must be above 0")
        if any(name != name.lower() for name in self.required_headers):
            raise InvalidArgument("required_headers: gRPC header names are lower-case")

    @property
    def batch_bytes(self) -> int:
        """Content accepted in one batch, 0 for no bound."""
        if self.enforced_batch_bytes is not None:
            return self.enforced_batch_bytes
        return self.max_batch_total_size_bytes


def like_casd() -> ServerOptions:
    """buildbox-casd: SHA-256, no compression, says no batch limit but has one, no QueryWriteStatus."""
    return ServerOptions(
        digest_functions=_SHA256,
        zstd_streams=False,
        zstd_batches=False,
        max_batch_total_size_bytes=0,
        query_write_status=False,
        resumable_writes=False,
        result_key_has_size=False,
        empty_result_not_found=True,
    )


def like_buildgrid() -> ServerOptions:
    """BuildGrid: as casd, states its batch limit, ignores `digest_function`, refuses `read_limit`."""
    return ServerOptions(
        digest_functions=_SHA256,
        ignores_digest_function=True,
        zstd_streams=False,
        zstd_batches=False,
        query_write_status=False,
        resumable_writes=False,
        read_limit_status=grpc.StatusCode.DATA_LOSS,
        update_disabled_status=grpc.StatusCode.UNIMPLEMENTED,
    )


def like_bazel_remote() -> ServerOptions:
    """bazel-remote: SHA-256, zstd that begins with a skippable frame, says no batch limit, action cache keys
    without size, no `read_limit`.
    """
    return ServerOptions(
        digest_functions=_SHA256,
        max_batch_total_size_bytes=0,
        zstd_skippable_frame=True,
        resumable_writes=False,
        read_limit_status=grpc.StatusCode.OUT_OF_RANGE,
        compressed_committed_size="minus-one",
        result_key_has_size=False,
    )


def like_nativelink(*, verify_hash: bool = False) -> ServerOptions:
    """NativeLink: SHA-256 and BLAKE3, no compression, 64 KiB batches, hashes that are not verified.

    Args:
        verify_hash: As with a `verify` store that has `verify_hash`: wrong bytes are refused, and so is every
            BLAKE3 blob in a batch, since the store hashes batches with SHA-256.
    """
    return ServerOptions(
        zstd_streams=False,
        zstd_batches=False,
        max_batch_total_size_bytes=64 * 1024,
        verify_writes=verify_hash,
        batch_hash_function=DigestFunction.SHA256 if verify_hash else None,
    )


def like_buildbarn() -> ServerOptions:
    """Buildbarn: no compression, no batch limit stated, no `read_limit`, no GetTree.

    Where it is configured to state zstd (here `zstd_streams=True`), compressed reads ignore `read_offset`.
    """
    return ServerOptions(
        zstd_streams=False,
        zstd_batches=False,
        max_batch_total_size_bytes=0,
        query_write_status=False,
        resumable_writes=False,
        zstd_read_offset=False,
        read_limit_status=grpc.StatusCode.UNIMPLEMENTED,
        beyond_end_status=grpc.StatusCode.INVALID_ARGUMENT,
        get_tree=False,
        compressed_committed_size="uncompressed",
    )


PRESETS = {
    "casd": like_casd,
    "buildgrid": like_buildgrid,
    "bazel-remote": like_bazel_remote,
    "nativelink": like_nativelink,
    "buildbarn": like_buildbarn,
}
"""The presets by name."""
