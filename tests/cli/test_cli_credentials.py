"""TLS, client certificates and headers reach the server."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_runner import CommandLine
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from snaploader.testing import EmbeddedServer, ServerOptions, ServerTLS
from snaploader.testing.conformance import CHECKS


@dataclass(frozen=True)
class Identity:
    """A certificate that is its own authority, and its key; as files and as bytes."""

    certificate: Path
    key: Path

    @classmethod
    def make(cls, folder: Path, name: str) -> Identity:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName(
                    [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
                ),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        made = cls(folder / f"{name}.crt", folder / f"{name}.key")
        made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        made.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return made


@pytest.fixture
def server_identity(tmp_path: Path) -> Identity:
    return Identity.make(tmp_path, "server")


@pytest.fixture
def client_identity(tmp_path: Path) -> Identity:
    return Identity.make(tmp_path, "client")


@pytest.fixture
def mutual(server_identity: Identity, client_identity: Identity) -> Iterator[EmbeddedServer]:
    """A server that demands the client's certificate."""
    tls = ServerTLS(
        server_identity.certificate.read_bytes(),
        server_identity.key.read_bytes(),
        client_ca=client_identity.certificate.read_bytes(),
    )
    with EmbeddedServer(tls=tls) as running:
        yield running


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_mutual_tls(
    cli: CommandLine, mutual: EmbeddedServer, server_identity: Identity, client_identity: Identity, file: Path
) -> None:
    trust = [
        "--remote-cache",
        mutual.url,
        "--tls-certificate",
        server_identity.certificate,
        "--remote-retries",
        0,
    ]
    client = [
        "--tls-client-certificate",
        client_identity.certificate,
        "--tls-client-key",
        client_identity.key,
    ]
    assert cli.json(*trust, *client, "save", "--ref", "main", file)["saved_remotely"] is True
    refused = cli(*trust, "save", "--ref", "main", file)
    assert refused.exit_code == 9
    assert "--tls-client-certificate" in refused.stderr


def test_a_server_that_is_not_trusted_gets_nothing(
    cli: CommandLine, mutual: EmbeddedServer, client_identity: Identity, file: Path
) -> None:
    trust = [
        "--remote-cache",
        mutual.url,
        "--tls-certificate",
        client_identity.certificate,
        "--remote-retries",
        0,
    ]
    refused = cli(*trust, "save", "--ref", "main", file)
    assert refused.exit_code == 4
    assert "--tls-certificate" in refused.stderr


def test_a_certificate_that_is_missing_is_named(cli: CommandLine, tmp_path: Path) -> None:
    outcome = cli(
        "--remote-cache", "grpcs://127.0.0.1:1", "--tls-certificate", tmp_path / "no.crt", "invalidate"
    )
    assert outcome.exit_code == 2
    assert "no.crt" in outcome.stderr


def test_the_conformance_suite_gets_the_same_credentials(
    cli: CommandLine,
    mutual: EmbeddedServer,
    server_identity: Identity,
    client_identity: Identity,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("snaploader.testing.conformance.run", lambda endpoint: [CHECKS[0].run(endpoint)])
    trust = ["--remote-cache", mutual.url, "--tls-certificate", server_identity.certificate]
    client = [
        "--tls-client-certificate",
        client_identity.certificate,
        "--tls-client-key",
        client_identity.key,
    ]
    outcome = cli(*trust, *client, "doctor", "--conformance", "--json")
    assert outcome.exit_code == 0, outcome
    assert outcome.json["checks"][-1]["name"] == "capabilities are usable"


def test_headers_are_sent(cli: CommandLine, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ServerOptions(required_headers={"x-team": "builds", "x-token": "a=b"})
    with EmbeddedServer(options=options) as server:
        save = ["--remote-cache", server.url, "save", "--ref", "main", file]
        assert cli(*save).exit_code == 9
        cli.ok("--remote-header", "x-team=builds", "--remote-header", "x-token=a=b", *save)
        monkeypatch.setenv("SNAPLOADER_REMOTE_HEADER", "x-team=builds\nx-token=a=b")
        cli.ok(*save)


def test_a_credential_helper_is_asked(cli: CommandLine, file: Path, tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    helper.write_text('#!/bin/sh\necho \'{"headers": {"x-team": ["builds"]}}\'\n')
    helper.chmod(0o755)
    with EmbeddedServer(options=ServerOptions(required_headers={"x-team": "builds"})) as server:
        cli.ok("--remote-cache", server.url, "--credential-helper", helper, "save", "--ref", "main", file)
