"""ActionCache: results under the digest of an action."""

from __future__ import annotations

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.digest import Digest
from snaploader.errors import FailedPrecondition, ResourceExhausted, SnaploaderError, Unimplemented
from snaploader.remote.calls import Caller
from snaploader.remote.capabilities import MESSAGE_LIMIT_BYTES
from snaploader.remote.codec import function_field, to_message
from snaploader.remote.retry import Cancellation


class ActionCacheClient:
    """Reads and writes action results. Thread-safe."""

    def __init__(self, caller: Caller) -> None:
        self._caller = caller

    def get(self, action_digest: Digest, cancellation: Cancellation) -> reapi.ActionResult:
        """Return the result kept under a digest. NotFound when there is none, or it is no longer whole."""
        request = reapi.GetActionResultRequest(
            instance_name=self._caller.instance_name,
            action_digest=to_message(action_digest),
            digest_function=function_field(action_digest.function),
        )

        result: reapi.ActionResult = self._caller.unary(
            f"getting action result {action_digest}", "GetActionResult", request, cancellation
        )
        return result

    def update(self, action_digest: Digest, result: reapi.ActionResult, cancellation: Cancellation) -> None:
        """Keep a result under a digest. FailedPrecondition where the server does not allow it."""
        if not self._caller.capabilities.update_enabled:
            raise _not_allowed(action_digest)
        request = reapi.UpdateActionResultRequest(
            instance_name=self._caller.instance_name,
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
        try:
            self._caller.unary(
                f"updating action result {action_digest}", "UpdateActionResult", request, cancellation
            )
        except Unimplemented as error:
            raise _not_allowed(action_digest) from error


def _not_allowed(action_digest: Digest) -> SnaploaderError:
    return FailedPrecondition(
        f"the server does not let action result {action_digest} be updated:"
        " use an endpoint, an instance or credentials that may write"
    )
