"""ActionCache: results under the digest of an action."""

from __future__ import annotations

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition, ResourceExhausted, SnaploaderError, Unimplemented
from snaploader.remote.cancel import Cancellation
from snaploader.remote.capabilities import MESSAGE_LIMIT_BYTES
from snaploader.remote.client import Connection
from snaploader.remote.retry import Attempts
from snaploader.remote.wire import function_field, to_message


class ActionCacheClient:
    """Reads and writes action results. Thread-safe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, action_digest: Digest, cancellation: Cancellation) -> reapi.ActionResult:
        """The result under a digest. NotFound when there is none, or it is no longer whole."""
        request = reapi.GetActionResultRequest(
            instance_name=self._connection.instance_name,
            action_digest=to_message(action_digest),
            digest_function=function_field(action_digest.function),
        )

        def attempt(attempts: Attempts) -> reapi.ActionResult:
            result: reapi.ActionResult = self._connection.transport.unary(
                "GetActionResult", request, attempts
            )
            return result

        return self._connection.run(f"getting action result {action_digest}", attempt, cancellation)

    def update(self, action_digest: Digest, result: reapi.ActionResult, cancellation: Cancellation) -> None:
        """Keep a result. FailedPrecondition where the server does not allow it."""
        if not self._connection.capabilities.update_enabled:
            raise _not_allowed(action_digest)
        request = reapi.UpdateActionResultRequest(
            instance_name=self._connection.instance_name,
            action_digest=to_message(action_digest),
            action_result=result,
            digest_function=function_field(action_digest.function),
        )
        size = request.ByteSize()
        if size > MESSAGE_LIMIT_BYTES:
            raise ResourceExhausted(
                f"action result {action_digest} has {size} bytes; servers take {MESSAGE_LIMIT_BYTES} at most:"
                " save fewer or smaller files in one snapshot",
                transient=False,
            )

        def attempt(attempts: Attempts) -> None:
            self._connection.transport.unary("UpdateActionResult", request, attempts)

        try:
            self._connection.run(f"updating action result {action_digest}", attempt, cancellation)
        except Unimplemented as error:
            raise _not_allowed(action_digest) from error


def _not_allowed(action_digest: Digest) -> SnaploaderError:
    return FailedPrecondition(
        f"the server does not let action result {action_digest} be updated:"
        " use an endpoint, an instance or credentials that may write"
    )
