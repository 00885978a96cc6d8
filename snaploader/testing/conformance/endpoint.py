"""A server under test, and what a check of it is.

The server is spoken to with bare gRPC, so that no cleverness of a client hides what it does.
"""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import grpc
import zstandard

from snaploader._proto import bytestream_pb2 as bytestream, remote_execution_pb2 as reapi, services
from snaploader.digest import Digest, DigestFunction
from snaploader.remote import codec
from snaploader.remote.config import parse_endpoint

MESSAGE_BYTES = 4 * 1024 * 1024 - 64 * 1024
"""Content that fits in a message of gRPC's default bound, with room for the fields around it."""

WRITE_BYTES = 1024 * 1024
"""Content of one WriteRequest."""

_MAX_WINDOW_BYTES = 128 * 1024 * 1024


class Endpoint:
    """A Remote Execution API server. Thread-safe; a context manager that closes its channel.

    Args:
        url: grpc://host:port, grpcs://host:port or unix:/path.
        headers: Sent with every call; lower-case names.
        root_certificates: PEM, for grpcs; None for the system's.
        client_certificate: PEM, for mTLS, with `client_key`, PEM too.
        timeout_s: Deadline of each call.
    """

    def __init__(
        self,
        url: str,
        *,
        instance_name: str = "",
        headers: Iterable[tuple[str, str | bytes]] = (),
        root_certificates: bytes | None = None,
        client_certificate: bytes | None = None,
        client_key: bytes | None = None,
        timeout_s: float = 30.0,
    ) -> None:
        self.url = url
        self.instance_name = instance_name
        self.headers = tuple(headers)
        self.timeout_s = timeout_s
        server = parse_endpoint(url)
        options = [("grpc.max_receive_message_length", 16 * 1024 * 1024)]
        if server.secure:
            credentials = grpc.ssl_channel_credentials(root_certificates, client_key, client_certificate)
            self._channel = grpc.secure_channel(server.target, credentials, options)
        else:
            self._channel = grpc.insecure_channel(server.target, options)

    def close(self) -> None:
        """Close the channel. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call_raw(self, path: str, request: bytes) -> bytes:
        """Call a method that is not of the Remote Execution API, bytes in and out. Raises grpc.RpcError."""
        call: Any = self._channel.unary_unary(path)
        answer: bytes = call(request, timeout=self.timeout_s, metadata=self.headers)
        return answer

    def stub(self, service: str, method: str) -> Any:
        """The callable of a method, as generated stubs have it."""
        described = services.methods(service)[method]
        make = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, False): self._channel.stream_unary,
        }[described.client_streaming, described.server_streaming]
        return make(
            described.path,
            request_serializer=described.request.SerializeToString,
            response_deserializer=described.response.FromString,
        )

    def call(self, service: str, method: str, request: Any) -> Any:
        """Call a method with this endpoint's headers and deadline. Raises grpc.RpcError."""
        return self.stub(service, method)(request, timeout=self.timeout_s, metadata=self.headers)

    def _ask(self, service: str, method: str, about: Sequence[Digest], **fields: Any) -> Any:
        """Call a method whose request names an instance and the digest function of blobs."""
        # SHA-256 is also what an unset function means.
        function = about[0].function.value if about else 0
        request = services.methods(service)[method].request(
            instance_name=self.instance_name, digest_function=function, **fields
        )
        return self.call(service, method, request)

    @cached_property
    def capabilities(self) -> reapi.ServerCapabilities:
        """What the server states; asked once."""
        request = reapi.GetCapabilitiesRequest(instance_name=self.instance_name)
        answer: reapi.ServerCapabilities = self.call(services.CAPABILITIES, "GetCapabilities", request)
        return answer

    @property
    def _caches(self) -> reapi.CacheCapabilities:
        return self.capabilities.cache_capabilities

    @property
    def functions(self) -> list[DigestFunction]:
        """Digest functions that both sides know."""
        offered = set(self._caches.digest_functions)
        return [function for function in DigestFunction if function.value in offered]

    @property
    def zstd_streams(self) -> bool:
        """Whether the server states zstd for ByteStream."""
        return reapi.Compressor.ZSTD in self._caches.supported_compressors

    @property
    def zstd_batches(self) -> bool:
        """Whether the server states zstd for BatchUpdateBlobs."""
        return reapi.Compressor.ZSTD in self._caches.supported_batch_update_compressors

    @property
    def update_enabled(self) -> bool:
        """Whether the server states that action results may be written."""
        return self._caches.action_cache_update_capabilities.update_enabled

    @property
    def batch_bytes(self) -> int:
        """Content that must fit in one batch."""
        return min(self._caches.max_batch_total_size_bytes or MESSAGE_BYTES, MESSAGE_BYTES)

    def missing(self, digests: Sequence[Digest]) -> set[str]:
        """Hashes that FindMissingBlobs says are missing."""
        blob_digests = [message(digest) for digest in digests]
        response = self._ask(services.CAS, "FindMissingBlobs", digests, blob_digests=blob_digests)
        return {digest.hash for digest in response.missing_blob_digests}

    def batch_update(
        self, items: Sequence[tuple[Digest, bytes]], *, zstd: bool = False
    ) -> dict[str, grpc.StatusCode]:
        """BatchUpdateBlobs: the status of each blob by hash."""
        compressor = reapi.Compressor.ZSTD if zstd else reapi.Compressor.IDENTITY
        requests = [
            reapi.BatchUpdateBlobsRequest.Request(digest=message(digest), data=data, compressor=compressor)
            for digest, data in items
        ]
        digests = [digest for digest, _ in items]
        response = self._ask(services.CAS, "BatchUpdateBlobs", digests, requests=requests)
        return {item.digest.hash: code(item.status.code) for item in response.responses}

    def batch_read(
        self, digests: Sequence[Digest], *, accept_zstd: bool = False
    ) -> dict[str, reapi.BatchReadBlobsResponse.Response]:
        """BatchReadBlobs: the item of each blob by hash."""
        response = self._ask(
            services.CAS,
            "BatchReadBlobs",
            digests,
            digests=[message(digest) for digest in digests],
            acceptable_compressors=[reapi.Compressor.ZSTD] if accept_zstd else [],
        )
        return {item.digest.hash: item for item in response.responses}

    def read(self, digest: Digest, *, offset: int = 0, zstd: bool = False) -> bytes:
        """The data of ByteStream.Read, as it came."""
        name = codec.read_name(self.instance_name, digest, zstd=zstd)
        request = bytestream.ReadRequest(resource_name=name, read_offset=offset)
        return b"".join(part.data for part in self.call(services.BYTE_STREAM, "Read", request))

    def upload_name(self, digest: Digest, *, zstd: bool = False) -> str:
        """A fresh resource name for a write."""
        return codec.upload_name(self.instance_name, digest, zstd=zstd)

    def write(self, digest: Digest, data: bytes, *, zstd: bool = False) -> int:
        """ByteStream.Write of these bytes under a fresh name: the committed size."""
        messages = write_requests(self.upload_name(digest, zstd=zstd), data)
        response = self.call(services.BYTE_STREAM, "Write", messages)
        size: int = response.committed_size
        return size

    def get_action_result(self, digest: Digest) -> reapi.ActionResult:
        """GetActionResult."""
        result: reapi.ActionResult = self._ask(
            services.ACTION_CACHE, "GetActionResult", [digest], action_digest=message(digest)
        )
        return result

    def update_action_result(self, digest: Digest, result: reapi.ActionResult) -> None:
        """UpdateActionResult."""
        fields = {"action_digest": message(digest), "action_result": result}
        self._ask(services.ACTION_CACHE, "UpdateActionResult", [digest], **fields)


def message(digest: Digest) -> reapi.Digest:
    """The digest as a message."""
    return reapi.Digest(hash=digest.hash, size_bytes=digest.size_bytes)


def code(number: int) -> grpc.StatusCode:
    """The gRPC code of a number in a message."""
    return next((known for known in grpc.StatusCode if known.value[0] == number), grpc.StatusCode.UNKNOWN)


def unpack(packed: bytes, limit: int) -> bytes:
    """The content of any sequence of zstd frames, skippable ones too (RFC 8878, 3.1); one byte beyond `limit`
    when it is longer.
    """
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    with decompressor.stream_reader(packed, read_across_frames=True) as reader:
        return reader.read(limit + 1)


def write_requests(
    name: str, data: bytes, *, offset: int = 0, end: int | None = None
) -> Iterator[bytestream.WriteRequest]:
    """The messages of a write of `data[offset:end]`, which is finished only at the end of `data`."""
    stop = len(data) if end is None else end
    is_first = True
    while is_first or offset < stop:
        piece = data[offset : min(stop, offset + WRITE_BYTES)]
        yield bytestream.WriteRequest(
            resource_name=name if is_first else "",
            write_offset=offset,
            data=piece,
            finish_write=offset + len(piece) == len(data),
        )
        offset += len(piece)
        is_first = False


def fresh(size: int, function: DigestFunction = DigestFunction.SHA256) -> tuple[Digest, bytes]:
    """A blob that no server has seen, and its digest."""
    data = os.urandom(size)
    return Digest.of(data, function), data


class Outcome(enum.StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"
    """The server does not offer what the check is about, which is allowed."""


class CheckFailed(Exception):
    """The server does not behave as the check demands."""


class CheckSkipped(Exception):
    """The check does not apply to this server."""


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of one check against one server."""

    name: str
    outcome: Outcome
    detail: str
    """Why it failed or was skipped; empty when it passed."""
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a server must do."""

    name: str
    """As in "stored_blobs_are_not_missing"."""
    description: str
    function: Callable[[Endpoint], None]
    """Returns when all is well; raises CheckFailed, CheckSkipped or what the transport raises."""

    def run(self, endpoint: Endpoint) -> CheckResult:
        """Do it. Whatever goes wrong is in the result, nothing is raised."""
        started = time.monotonic()
        outcome, detail = Outcome.PASSED, ""
        try:
            self.function(endpoint)
        except CheckSkipped as skipped:
            outcome, detail = Outcome.SKIPPED, str(skipped)
        except grpc.RpcError as error:
            outcome, detail = Outcome.FAILED, f"the server answered {error.code().name}: {error.details()}"
        except CheckFailed as error:
            outcome, detail = Outcome.FAILED, str(error)
        except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not a crash
            outcome, detail = Outcome.FAILED, f"{type(error).__name__}: {error}"
        return CheckResult(self.name, outcome, detail, time.monotonic() - started)

    def __str__(self) -> str:
        return self.name


def require(is_met: bool, message: str) -> None:
    """CheckFailed with this message, unless the condition is met."""
    if not is_met:
        raise CheckFailed(message)


def skip_unless(is_met: bool, message: str) -> None:
    """CheckSkipped with this message, unless the condition is met."""
    if not is_met:
        raise CheckSkipped(message)
