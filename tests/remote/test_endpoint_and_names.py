"""URLs, resource names, headers: what goes on the wire, and what is refused before."""

from __future__ import annotations

import re

import pytest

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.context import REQUEST_METADATA_HEADER, checked_headers
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import InvalidArgument
from snaploader.remote import Limits, RemoteCache, RequestMetadata, RetryPolicy, Timeouts, TLSConfig
from snaploader.remote.codec import instance_name_error, read_name, upload_name
from snaploader.remote.config import parse_endpoint

SHA = Digest.of(b"abc", DigestFunction.SHA256)
B3 = Digest.of(b"abc", DigestFunction.BLAKE3)


@pytest.mark.parametrize(
    ("url", "target", "secure", "host", "uri"),
    [
        ("grpc://cache:8980", "dns:///cache:8980", False, "cache", "http://cache:8980"),
        ("grpc://cache", "dns:///cache:80", False, "cache", "http://cache:80"),
        ("grpcs://cache.example", "dns:///cache.example:443", True, "cache.example", "https://cache.example"),
        ("grpcs://cache:8443/", "dns:///cache:8443", True, "cache", "https://cache:8443"),
        ("grpc://[::1]:80", "dns:///[::1]:80", False, "::1", "http://[::1]:80"),
        ("unix:/run/cas.sock", "unix:/run/cas.sock", False, "localhost", "http://localhost"),
        ("unix:///run/cas.sock", "unix:/run/cas.sock", False, "localhost", "http://localhost"),
        ("unix:cas.sock", "unix:cas.sock", False, "localhost", "http://localhost"),
    ],
)
def test_url_names_endpoint(url: str, target: str, secure: bool, host: str, uri: str) -> None:
    assert parse_endpoint(url) == (target, secure, host, uri, url)


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("", "must start with"),
        ("cache:8980", "must start with"),
        ("http://cache:8980", "must start with"),
        ("grpc://", "names no host"),
        ("grpc://ca\0che:80", "names no host"),
        ("grpc://cache:port", "malformed"),
        ("grpc://cache:99999", "malformed"),
        ("grpc://cache:1/main", "instance_name"),
        ("grpc://cache:1?x=1", "more than a host"),
        ("grpc://user:secret@cache:1", "no credentials"),
        ("unix:", "no socket path"),
    ],
)
def test_bad_url_is_refused_with_a_hint(url: str, hint: str) -> None:
    with pytest.raises(InvalidArgument, match=hint) as caught:
        RemoteCache(url)
    assert "secret" not in str(caught.value)


def test_read_names_follow_the_specification() -> None:
    assert read_name("", SHA) == f"blobs/{SHA.hash}/3"
    assert read_name("a/b", SHA) == f"a/b/blobs/{SHA.hash}/3"
    assert read_name("", B3) == f"blobs/blake3/{B3.hash}/3"
    assert read_name("i", B3, zstd=True) == f"i/compressed-blobs/zstd/blake3/{B3.hash}/3"


def test_upload_names_are_never_the_same() -> None:
    pattern = rf"i/uploads/[0-9a-f-]{{36}}/compressed-blobs/zstd/{SHA.hash}/3"
    one, other = upload_name("i", SHA, zstd=True), upload_name("i", SHA, zstd=True)
    assert re.fullmatch(pattern, one)
    assert one != other
    assert upload_name("", B3).endswith(f"/blobs/blake3/{B3.hash}/3")


@pytest.mark.parametrize("name", ["blobs", "a/uploads", "/a", "a/", "a//b", "a\0b", "x\ny"])
def test_bad_instance_names_are_refused(name: str) -> None:
    assert instance_name_error(name)
    with pytest.raises(InvalidArgument, match="instance name"):
        RemoteCache("grpc://cache:1", instance_name=name)


def test_headers_are_lowered_and_checked() -> None:
    assert checked_headers({"X-Key": "v", "x-b-bin": b"\0"}) == (("x-key", "v"), ("x-b-bin", b"\0"))
    for headers in (
        {"x y": "v"},
        {"grpc-x": "v"},
        {"": "v"},
        {"x": "line\nbreak"},
        {"x": "ü"},
        {"x-bin": "text"},
    ):
        with pytest.raises(InvalidArgument, match="header"):
            checked_headers(headers)


def test_header_values_stay_out_of_messages() -> None:
    with pytest.raises(InvalidArgument) as caught:
        checked_headers({"authorization": "s3cret\n"})
    assert "s3cret" not in str(caught.value)


def test_request_metadata_names_the_tool_and_the_invocation() -> None:
    name, value = RequestMetadata(action_id="a", correlated_invocations_id="c").header()
    message = reapi.RequestMetadata.FromString(value)
    assert name == REQUEST_METADATA_HEADER
    assert message.tool_details.tool_name == "snaploader"
    assert (message.action_id, message.correlated_invocations_id) == ("a", "c")
    assert len(message.tool_invocation_id) == 36


def test_client_certificate_and_key_come_together() -> None:
    for half in (TLSConfig, TLSConfig):
        with pytest.raises(InvalidArgument, match="key"):
            half(client_certificate=b"x")
    with pytest.raises(InvalidArgument, match="certificate"):
        TLSConfig(client_key=b"x")


def test_tls_settings_need_a_tls_url() -> None:
    with pytest.raises(InvalidArgument, match="grpcs"):
        RemoteCache("grpc://cache:1", tls=TLSConfig())


def test_secrets_stay_out_of_reprs() -> None:
    cache = RemoteCache("grpc://cache:1", bearer_token="s3cret", headers={"x": "s3cret"})
    assert "s3cret" not in repr(cache)
    assert "s3cret" not in repr(TLSConfig(client_certificate=b"s3cret", client_key=b"s3cret"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Timeouts(call_s=0),
        lambda: Timeouts(keepalive_s=-1),
        lambda: RetryPolicy(attempts=0),
        lambda: RetryPolicy(jitter=2),
        lambda: RetryPolicy(budget_s=0),
        lambda: Limits(workers=0),
        lambda: Limits(stream_frame_bytes=1 << 23),
    ],
)
def test_senseless_settings_are_refused(make: object) -> None:
    with pytest.raises(InvalidArgument):
        make()  # type: ignore[operator]
