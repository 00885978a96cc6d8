"""Proof of who asks: tokens, .netrc files, credential helpers."""

from __future__ import annotations

import base64
import json
import math
import netrc
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any

from snaploader.context import Credentials, Headers, Secret, checked_headers, current
from snaploader.errors import FailedPrecondition, InvalidArgument, SnaploaderError, Unauthenticated
from snaploader.remote.config import Endpoint
from snaploader.workers import Once

SECRET_NAME = re.compile(r"auth|cookie|key|passw|secret|token")
"""In the names of headers that likely hold what should not be sent in the clear."""

_EXPIRY_MARGIN_S = 30.0
_MAX_HELPER_OUTPUT = 1024 * 1024


class BearerToken:
    """Sends `authorization: Bearer …`, from a fixed token or from a function that gives the current one.

    In a call with a deadline or a cancellation, which may end before the function does, it is called on
    another thread.

    Two with the same token, or the same function, are equal.
    """

    def __init__(self, token: str | Callable[[], str]) -> None:
        if not (callable(token) or (isinstance(token, str) and token)):
            raise InvalidArgument("a bearer token is a text that is not empty, or a function that gives one")
        self._token = Secret(token) if isinstance(token, str) else token
        if isinstance(token, str):
            self.headers()  # InvalidArgument for what cannot be sent

    def headers(self) -> Headers:
        token = self._token if isinstance(self._token, str) else current().wait_for(self._token)
        return checked_headers([("authorization", f"Bearer {token}")])

    def refresh(self) -> bool:
        return not isinstance(self._token, str)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BearerToken) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)


class Netrc:
    """Sends `authorization: Basic …`, from a .netrc file that is read once, and again after a refusal."""

    def __init__(self, path: str | os.PathLike[str], host: str) -> None:
        self._path = os.fspath(path)
        self._host = host
        self._lock = threading.Lock()
        self._headers: Headers | None = None

    def headers(self) -> Headers:
        with self._lock:
            if self._headers is None:
                self._headers = self._read()
            return self._headers

    def refresh(self) -> bool:
        with self._lock:
            old, self._headers = self._headers, None
        return self.headers() != old

    def _read(self) -> Headers:
        try:
            entry = netrc.netrc(self._path).authenticators(self._host)
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
            raise Unauthenticated(f"cannot read credentials from {self._path!r}: {error}") from error
        if entry is None:
            return ()
        login, _account, password = entry
        basic = base64.b64encode(f"{login}:{password}".encode()).decode()
        return checked_headers([("authorization", f"Basic {basic}")])


class CredentialHelper:
    """Asks a program for headers, by Bazel's credential helper protocol.

    Runs `HELPER get` with `{"uri": …}` on its standard input and expects `{"headers": {name:
    [values…]}, "expires": RFC 3339 time}` on its standard output. The answer is kept until shortly
    before it expires; without a time, until a server refuses it. The program is found on PATH.
    """

    def __init__(self, command: str | os.PathLike[str], uri: str, timeout_s: float) -> None:
        self._command = os.fspath(command)
        self._uri = uri
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._answer = Once(self._ask)
        self._expires = math.inf

    def headers(self) -> Headers:
        with self._lock:
            if time.time() >= self._expires:
                self._forget()
            answer = self._answer
        return answer.get()

    def refresh(self) -> bool:
        with self._lock:
            self._forget()
        return True

    def _forget(self) -> None:
        self._answer, self._expires = Once(self._ask), math.inf

    def _ask(self) -> Headers:
        done = self._run()
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()[-500:]
            raise Unauthenticated(f"credential helper {self._command!r} ended with {done.returncode}: {said}")
        try:
            headers, self._expires = _parse_answer(done.stdout)
        except (ValueError, TypeError, AttributeError) as error:
            # The answer itself holds secrets: neither it nor the parser's message is shown.
            raise Unauthenticated(
                f"the answer of credential helper {self._command!r} is not understood: {type(error).__name__}"
            ) from None
        return headers

    def _run(self) -> subprocess.CompletedProcess[bytes]:
        """Run the program to its end, or to that of the call."""
        command = [self._command, "get"]
        context = current()
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            try:
                said = context.wait_for(partial(self._talk, process))
            finally:
                process.kill()  # it may go on when the call is called off
            return subprocess.CompletedProcess(command, process.returncode, *said)
        except subprocess.TimeoutExpired as error:
            raise Unauthenticated(
                f"credential helper {self._command!r} gave no answer within {self._timeout_s:g} s"
            ) from error
        except SnaploaderError:
            raise
        except OSError as error:
            raise FailedPrecondition(
                f"cannot run the credential helper {self._command!r}: {error}"
            ) from error

    def _talk(self, process: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
        """Say what the headers are for; returns what it said, and what it said of errors."""
        question = json.dumps({"uri": self._uri}).encode()
        with process:
            try:
                return process.communicate(question, self._timeout_s)
            finally:
                process.kill()


def _parse_answer(answer: bytes) -> tuple[Headers, float]:
    if len(answer) > _MAX_HELPER_OUTPUT:
        raise ValueError("too long")
    parsed: dict[str, Any] = json.loads(answer)
    headers = [(name, value) for name, values in parsed.get("headers", {}).items() for value in values]
    expires = math.inf
    if text := parsed.get("expires"):
        moment = datetime.fromisoformat(text)
        expires = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - _EXPIRY_MARGIN_S
    return checked_headers(headers), expires


def make_credentials(
    endpoint: Endpoint,
    *,
    bearer_token: str | Callable[[], str] | None,
    credential_helper: str | os.PathLike[str] | None,
    netrc_file: str | os.PathLike[str] | None,
    helper_timeout_s: float,
) -> Credentials | None:
    """Make the source of credentials that was chosen, if one was. InvalidArgument for more than one."""
    given = [x for x in (bearer_token, credential_helper, netrc_file) if x is not None]
    if len(given) > 1:
        raise InvalidArgument("give one of bearer_token, credential_helper and netrc, not several")
    if bearer_token is not None:
        return BearerToken(bearer_token)
    if credential_helper is not None:
        return CredentialHelper(credential_helper, endpoint.uri, helper_timeout_s)
    if netrc_file is not None:
        return Netrc(netrc_file, endpoint.host)
    return None
