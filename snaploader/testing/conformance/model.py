"""What a conformance check is, and what comes out of it."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc

from snaploader.digest import Digest, DigestFunction
from snaploader.errors import SnaploaderError
from snaploader.testing.conformance.endpoint import Endpoint


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
        except (CheckFailed, SnaploaderError) as error:
            outcome, detail = Outcome.FAILED, str(error)
        except Exception as error:  # noqa: BLE001 - a check that breaks is a finding, not a crash
            outcome, detail = Outcome.FAILED, f"{type(error).__name__}: {error}"
        return CheckResult(self.name, outcome, detail, time.monotonic() - started)

    def __str__(self) -> str:
        return self.name


class Suite:
    """Collects checks in the order they are written."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def __call__(self, function: Callable[[Endpoint], None]) -> Callable[[Endpoint], None]:
        """Decorator: the function is a check, named and described by its name and docstring."""
        description = (function.__doc__ or "").strip()
        self.checks.append(Check(function.__name__, description, function))
        return function


def require(is_met: bool, message: str) -> None:
    """CheckFailed with this message, unless the condition is met."""
    if not is_met:
        raise CheckFailed(message)


def store(endpoint: Endpoint, blobs: list[tuple[Digest, bytes]]) -> None:
    """Store blobs in one batch. CheckFailed when the server does not take each."""
    statuses = endpoint.batch_update(blobs)
    for digest, _ in blobs:
        require_stored(statuses, digest)


def require_stored(statuses: Mapping[str, grpc.StatusCode], digest: Digest) -> None:
    """CheckFailed unless these statuses of a BatchUpdateBlobs say that the blob was taken."""
    status = statuses.get(digest.hash)
    name = "nothing" if status is None else status.name
    hint = ""
    if status == grpc.StatusCode.INVALID_ARGUMENT and digest.function is DigestFunction.BLAKE3:
        # NativeLink with `verify_hash` does so, and takes the same blob in a stream.
        hint = ": it may hash batches with SHA-256 although the request names BLAKE3"
    require(status == grpc.StatusCode.OK, f"BatchUpdateBlobs answered {name} for {digest}{hint}")
