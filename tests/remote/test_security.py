"""TLS, mutual TLS, headers, tokens, credential helpers and .netrc, against servers that demand them."""

from __future__ import annotations

import datetime
import ipaddress
import json
import logging
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from remote_data import QUICK, MakeRemote, MakeServer, named

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.context import REQUEST_METADATA_HEADER, CallContext
from snaploader.errors import FailedPrecondition, InvalidArgument, Unauthenticated
from snaploader.remote import RemoteCache, RequestMetadata, RetryPolicy, TLSConfig
from snaploader.remote.auth import CredentialHelper, Netrc
from snaploader.remote.channel import tls_failure
from snaploader.remote.config import parse_endpoint
from snaploader.testing import ServerTLS

ONE_TRY = RetryPolicy(attempts=1)


@dataclass(frozen=True)
class Certificate:
    certificate: bytes
    key: bytes


class Authority:
    """A certificate authority that lives as long as a test run."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        builder = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.pem = builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def issue(self, *names: x509.GeneralName, valid_h: float = 1) -> Certificate:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        builder = self._builder(subject, key, valid_h)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        return Certificate(
            builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM),
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            ),
        )

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, valid_h: float = 1
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=valid_h))
        )


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def for_loopback(authority: Authority) -> Certificate:
    return authority.issue(x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


def works(remote: RemoteCache) -> bool:
    (digest,) = named(b"x")
    remote.write(digest, b"x")
    return remote.read(digest) == b"x"


def test_tls_with_the_right_authority_works(
    authority: Authority,
    for_loopback: Certificate,
    make_server: MakeServer,
    make_remote: MakeRemote,
    tmp_path: Path,
) -> None:
    server = make_server(tls=ServerTLS(for_loopback.certificate, for_loopback.key))
    assert server.url.startswith("grpcs://")
    assert works(make_remote(server, tls=TLSConfig(certificate=authority.pem)))
    path = tmp_path / "authority.pem"
    path.write_bytes(authority.pem)
    assert works(make_remote(server, tls=TLSConfig(certificate=path)))


def test_tls_refuses_an_authority_it_does_not_know(
    for_loopback: Certificate, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(tls=ServerTLS(for_loopback.certificate, for_loopback.key))
    for tls in (None, TLSConfig(certificate=Authority().pem)):
        with pytest.raises(FailedPrecondition, match=r"certificate of grpcs://.* is not accepted"):
            make_remote(server, tls=tls).capabilities()
    assert server.total_calls() == 0


def test_an_expired_certificate_is_named_and_not_tried_again(
    authority: Authority, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    ended = authority.issue(x509.IPAddress(ipaddress.ip_address("127.0.0.1")), valid_h=-0.5)
    server = make_server(tls=ServerTLS(ended.certificate, ended.key))
    remote = make_remote(server, tls=TLSConfig(certificate=authority.pem))
    with pytest.raises(FailedPrecondition, match="certificate has expired"):
        remote.capabilities()
    assert remote.statistics().retries == 0


def test_tls_towards_a_server_without_it_says_so(make_server: MakeServer, make_remote: MakeRemote) -> None:
    url = make_server().url.replace("grpc://", "grpcs://")
    with pytest.raises(FailedPrecondition, match="does not speak TLS"):
        make_remote(url).capabilities()


def test_a_lost_connection_is_not_blamed_on_tls(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        endpoint = parse_endpoint(f"grpcs://127.0.0.1:{listening.getsockname()[1]}")
    assert tls_failure(endpoint, TLSConfig(certificate=authority.pem), 10) is None


def test_tls_server_name_is_checked_and_can_be_told(
    authority: Authority, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    other = authority.issue(x509.DNSName("cache.example"))
    server = make_server(tls=ServerTLS(other.certificate, other.key))
    with pytest.raises(FailedPrecondition, match=r"not valid for '127\.0\.0\.1'"):
        make_remote(server, tls=TLSConfig(certificate=authority.pem)).capabilities()
    tls = TLSConfig(certificate=authority.pem, server_name="cache.example")
    assert works(make_remote(server, tls=tls))


def test_mutual_tls_needs_the_clients_certificate(
    authority: Authority, for_loopback: Certificate, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    tls = ServerTLS(for_loopback.certificate, for_loopback.key, client_ca=authority.pem)
    server = make_server(tls=tls)
    client = authority.issue()
    known = TLSConfig(authority.pem, client.certificate, client.key)
    assert works(make_remote(server, tls=known))
    stranger = Authority().issue()
    for tls_config in (
        TLSConfig(authority.pem),
        TLSConfig(authority.pem, stranger.certificate, stranger.key),
    ):
        with pytest.raises(Unauthenticated, match="certificate of this client"):
            make_remote(server, tls=tls_config, retry=ONE_TRY).capabilities()


def test_unusable_certificate_files_are_named(make_remote: MakeRemote, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="TLS certificate"):
        make_remote("grpcs://127.0.0.1:1", tls=TLSConfig(certificate=tmp_path / "none")).capabilities()
    with pytest.raises(InvalidArgument, match="PEM"):
        make_remote("grpcs://127.0.0.1:1", tls=TLSConfig(certificate=b"rubbish")).capabilities()


def test_headers_and_request_metadata_go_with_every_call(
    make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(required_headers={"x-team": "blue"})
    who = RequestMetadata(action_id="the action", tool_invocation_id="run 1")
    assert works(make_remote(server, headers={"X-Team": "blue"}, request_metadata=who))
    for call in server.requests:
        sent = call.metadata[REQUEST_METADATA_HEADER]
        assert isinstance(sent, bytes)
        assert reapi.RequestMetadata.FromString(sent).tool_invocation_id == "run 1"
        assert call.metadata["x-team"] == "blue"
        assert str(call.metadata["user-agent"]).startswith("snaploader/")
    with pytest.raises(Unauthenticated):
        make_remote(server).capabilities()


def test_bearer_token_is_sent(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(bearer_token="s3cret")
    assert works(make_remote(server, bearer_token="s3cret"))
    for token in (None, "not it"):
        with pytest.raises(Unauthenticated) as caught:
            make_remote(server, bearer_token=token).capabilities()
        assert "not it" not in str(caught.value)


def test_token_that_expired_is_asked_for_again_once(make_server: MakeServer, make_remote: MakeRemote) -> None:
    server = make_server(bearer_token="new")
    tokens = iter(["old", "new", "new", "new"])
    remote = make_remote(server, bearer_token=lambda: next(tokens))
    remote.capabilities()
    assert server.calls("GetCapabilities") == 2
    always_old = make_remote(server, bearer_token=lambda: "old")
    with pytest.raises(Unauthenticated):
        always_old.capabilities()
    assert server.calls("GetCapabilities") == 4


HELPER = """#!{python} -SE
import json, os, sys
folder = os.path.dirname(__file__)
with open(os.path.join(folder, "asked"), "a") as asked:
    asked.write(sys.argv[1] + " " + json.load(sys.stdin)["uri"] + "\\n")
print(open(os.path.join(folder, "answer")).read())
"""


@dataclass(frozen=True)
class Helper:
    folder: Path

    @property
    def command(self) -> Path:
        return self.folder / "helper"

    def answer(self, text: object) -> None:
        (self.folder / "answer").write_text(text if isinstance(text, str) else json.dumps(text))

    def answer_token(self, token: str, **more: str) -> None:
        self.answer({"headers": {"Authorization": [f"Bearer {token}"]}, **more})

    @property
    def asked(self) -> list[str]:
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def helper(tmp_path: Path) -> Helper:
    made = Helper(tmp_path)
    made.command.write_text(HELPER.format(python=sys.executable))
    made.command.chmod(0o755)
    return made


def test_credential_helper_is_asked_once_and_its_headers_sent(
    helper: Helper, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    helper.answer_token("s3cret", expires="2999-01-01T00:00:00Z")
    server = make_server(bearer_token="s3cret")
    assert works(make_remote(server, credential_helper=helper.command))
    assert helper.asked == [f"get http://127.0.0.1:{server.port}"]


def test_credential_helper_is_asked_again_after_a_refusal(
    helper: Helper, make_server: MakeServer, make_remote: MakeRemote
) -> None:
    server = make_server(bearer_token="new")
    helper.answer_token("old")
    remote = make_remote(server, credential_helper=helper.command)
    with pytest.raises(Unauthenticated):
        remote.capabilities()
    assert len(helper.asked) == 2
    helper.answer_token("new")
    assert works(remote)
    assert len(helper.asked) == 3


def test_credential_helpers_answer_is_kept_until_it_expires(helper: Helper) -> None:
    source = CredentialHelper(helper.command, "https://cache", 10)
    helper.answer_token("one", expires="2999-01-01T00:00:00+00:00")
    assert source.headers() == source.headers() == (("authorization", "Bearer one"),)
    assert len(helper.asked) == 1
    source.refresh()
    helper.answer_token("two", expires="2001-01-01T00:00:00Z")
    source.headers()
    source.headers()
    assert len(helper.asked) == 3


@pytest.mark.parametrize(
    "answer",
    [
        "no json s3cret",
        '["s3cret"]',
        '{"headers": {"x": 7}}',
        '{"headers": {"x": ["s3cret\\n"]}}',
        '{"expires": "s3cret"}',
    ],
)
def test_answer_that_is_not_understood_is_not_shown(answer: str, helper: Helper) -> None:
    helper.answer(answer)
    with pytest.raises((Unauthenticated, InvalidArgument)) as caught:
        CredentialHelper(helper.command, "https://cache", 10).headers()
    assert "s3cret" not in str(caught.value)


def test_credential_helper_that_fails_says_why(tmp_path: Path) -> None:
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'log in first' >&2; exit 3\n")
    failing.chmod(0o755)
    with pytest.raises(Unauthenticated, match="ended with 3: log in first"):
        CredentialHelper(failing, "https://cache", 10).headers()
    with pytest.raises(FailedPrecondition, match="cannot run"):
        CredentialHelper(tmp_path / "none", "https://cache", 10).headers()
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    with pytest.raises(Unauthenticated, match="no answer within"):
        CredentialHelper(hanging, "https://cache", 0.1).headers()


def test_netrc_gives_a_login_for_the_host_only(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine cache.example login me password s3cret\n")
    path.chmod(0o600)
    assert Netrc(path, "cache.example").headers() == (("authorization", "Basic bWU6czNjcmV0"),)
    assert Netrc(path, "other.example").headers() == ()
    source = Netrc(path, "cache.example")
    source.headers()
    assert not source.refresh()
    path.write_text("machine cache.example login me password other\n")
    assert source.refresh()
    with pytest.raises(Unauthenticated, match="cannot read"):
        Netrc(tmp_path / "none", "cache.example").headers()


def test_netrc_is_sent(make_server: MakeServer, make_remote: MakeRemote, tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    path.write_text("machine 127.0.0.1 login me password s3cret\n")
    path.chmod(0o600)
    server = make_server(required_headers={"authorization": "Basic bWU6czNjcmV0"})
    assert works(make_remote(server, netrc=path))


def test_one_source_of_credentials_at_most() -> None:
    with pytest.raises(InvalidArgument, match="one of"):
        RemoteCache("grpc://cache:1", bearer_token="x", credential_helper="y", retry=QUICK)


def test_no_repr_shows_a_token(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine cache login me password s3cret\n")
    (tmp_path / "netrc").chmod(0o600)
    for arguments in (
        {"headers": {"x-key": "s3cret"}},
        {"bearer_token": "s3cret"},
        {"netrc": tmp_path / "netrc"},
    ):
        with RemoteCache("grpc://cache:1", **arguments) as remote:
            settings = remote._settings
            shown: list[object] = [remote, settings]
            if settings.credentials is not None:
                shown += [settings.credentials.headers(), vars(settings.credentials)]
            assert "s3cret" not in repr(shown)
            assert "czNjcmV0" not in repr(shown)


def warnings_of(
    url: str, make_remote: MakeRemote, caplog: pytest.LogCaptureFixture, **arguments: object
) -> list[str]:
    caplog.clear()
    transport = make_remote(url, **arguments)._connect()._transport
    transport._headers(CallContext())
    transport._headers(CallContext())  # as two calls would
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_credentials_that_go_to_another_host_in_the_clear_are_told_once(
    make_remote: MakeRemote, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = "grpc://192.0.2.1:1"
    (told,) = warnings_of(elsewhere, make_remote, caplog, bearer_token="s3cret")
    assert "(authorization) go to grpc://192.0.2.1:1 without encryption" in told
    assert "s3cret" not in told
    (told,) = warnings_of(elsewhere, make_remote, caplog, headers={"x-team": "blue", "x-api-key": "s3cret"})
    assert "(x-api-key)" in told
    assert warnings_of(elsewhere, make_remote, caplog, headers={"x-team": "blue"}) == []
    for url in ("grpc://127.0.0.1:1", "grpc://localhost:1", "unix:/nonexistent", "grpcs://192.0.2.1:1"):
        assert warnings_of(url, make_remote, caplog, bearer_token="s3cret") == []
