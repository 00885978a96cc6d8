"""A gRPC channel, with the settings and certificates of one endpoint."""

from __future__ import annotations

import os

import grpc

from snaploader._version import __version__
from snaploader.errors import InvalidArgument, translate_os_errors
from snaploader.remote.config import PEM, Limits, Timeouts, TLSConfig
from snaploader.remote.endpoint import Endpoint

_MAX_RECONNECT_MS = 5_000


def channel_options(timeouts: Timeouts, limits: Limits, server_name: str = "") -> list[tuple[str, str | int]]:
    """gRPC's channel arguments."""
    options: list[tuple[str, str | int]] = [
        ("grpc.primary_user_agent", f"snaploader/{__version__}"),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", limits.max_receive_message_bytes),
        ("grpc.enable_retries", 0),  # snaploader.remote.retry is the one retry layer
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.use_local_subchannel_pool", 1),  # closing a cache closes its connection, whoever else has one
        ("grpc.enable_http_proxy", 0),  # would read environment variables
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", int(timeouts.connect_s * 1000)),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
    ]
    if timeouts.keepalive_s:
        interval_ms = int(timeouts.keepalive_s * 1000)
        options += [
            ("grpc.keepalive_time_ms", interval_ms),
            ("grpc.keepalive_timeout_ms", interval_ms),
            ("grpc.keepalive_permit_without_calls", 0),
        ]
    if server_name:
        options += [("grpc.ssl_target_name_override", server_name), ("grpc.default_authority", server_name)]
    return options


def open_channel(endpoint: Endpoint, tls: TLSConfig, timeouts: Timeouts, limits: Limits) -> grpc.Channel:
    """A channel to the endpoint; it connects at the first call. InvalidArgument for unusable certificates."""
    options = channel_options(timeouts, limits, tls.server_name if endpoint.secure else "")
    if not endpoint.secure:
        return grpc.insecure_channel(endpoint.target, options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_pem(tls.certificate, "the TLS certificate"),
        private_key=_pem(tls.client_key, "the TLS client key"),
        certificate_chain=_pem(tls.client_certificate, "the TLS client certificate"),
    )
    return grpc.secure_channel(endpoint.target, credentials, options)


def _pem(source: PEM | None, what: str) -> bytes | None:
    if source is None:
        return None
    if isinstance(source, bytes):
        content = source
    else:
        with (
            translate_os_errors(f"cannot read {what}", absent=InvalidArgument),
            open(os.fspath(source), "rb") as file,
        ):
            content = file.read()
    if b"-----BEGIN " not in content:
        raise InvalidArgument(f"{what} is not in PEM form (it has no -----BEGIN line)")
    return content
