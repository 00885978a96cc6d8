"""The conformance suite of `snaploader.testing`, run against the configured remote cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from snaploader.cli.doctor.check import Result, Status
from snaploader.cli.session import Settings, read_secret
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.remote.auth import make_credentials
from snaploader.remote.config import parse_endpoint
from snaploader.testing import conformance

_STATUS = {
    conformance.Outcome.PASSED: Status.OK,
    conformance.Outcome.FAILED: Status.FAILED,
    conformance.Outcome.SKIPPED: Status.SKIPPED,
}
_REMEDY = "the server deviates from the Remote Execution API; see whether a newer version does"


def run_conformance(settings: Settings) -> list[Result]:
    """The result of every check. InvalidArgument when an option is set that the suite does not know."""
    with _endpoint(settings) as endpoint:
        return [_result(result) for result in conformance.run(endpoint)]


def _result(result: conformance.CheckResult) -> Result:
    status = _STATUS[result.outcome]
    remedy = _REMEDY if status is Status.FAILED else ""
    name = result.name.replace("_", " ")
    return Result("conformance", name, status, result.detail, remedy, result.elapsed_s)


@contextlib.contextmanager
def _endpoint(settings: Settings) -> Iterator[conformance.Endpoint]:
    if settings.tls_server_name:
        raise InvalidArgument(
            "--conformance works without --tls-server-name: name the server in --remote-cache as its "
            "certificate does"
        )
    server = parse_endpoint(settings.remote_cache)
    credentials = make_credentials(
        bearer_token=read_secret(settings.bearer_token_file),
        credential_helper=settings.credential_helper,
        netrc_file=settings.netrc,
        host=server.host,
        uri=server.uri,
        helper_timeout_s=settings.remote_timeout,
    )
    headers: list[tuple[str, str | bytes]] = [(name.lower(), value) for name, value in settings.remote_header]
    headers += credentials.headers()  # once: the suite is over before they expire
    with conformance.Endpoint(
        settings.remote_cache,
        instance_name=settings.remote_instance_name,
        headers=headers,
        root_certificates=_pem(settings.tls_certificate),
        client_certificate=_pem(settings.tls_client_certificate),
        client_key=_pem(settings.tls_client_key),
        timeout_s=settings.remote_timeout,
    ) as endpoint:
        yield endpoint


def _pem(path: Path | None) -> bytes | None:
    if path is None:
        return None
    with translate_os_errors(f"cannot read {str(path)!r}"):
        return path.read_bytes()
