"""`doctor` finds nothing wrong where nothing is, and says what is wrong where something is."""

from __future__ import annotations

import base64
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from cli_runner import CommandLine, Outcome

from snaploader.cli import doctor
from snaploader.errors import NotFound, translate_os_errors
from snaploader.filecache import FileCache
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions


def statuses(outcome: Outcome) -> dict[str, str]:
    return {f"{check['area']}: {check['name']}": check["status"] for check in outcome.json["checks"]}


def found(outcome: Outcome, name: str) -> dict[str, Any]:
    return next(check for check in outcome.json["checks"] if check["name"] == name)


def test_all_is_well(cli: CommandLine, server: EmbeddedServer, tmp_path: Path) -> None:
    outcome = cli("--remote-cache", server.url, "doctor", "--json")
    assert outcome.exit_code == 0
    assert outcome.json["passed"] is True
    assert set(statuses(outcome).values()) <= {"ok", "warning"}
    assert statuses(outcome)["remote: action cache"] == "ok"
    # It leaves nothing in the cache.
    assert cli.json("cache", "ls")["entries"] == []
    folder = tmp_path / "xdg-cache/snaploader"
    assert [name for name in os.listdir(folder) if "doctor" in name] == []


def test_without_a_remote_cache_it_says_that_none_was_checked(cli: CommandLine) -> None:
    outcome = cli.ok("doctor")
    assert "no --remote-cache is configured" in outcome.stderr
    assert "cache: write, read, verify" in outcome.text


def test_a_dead_server_is_found_and_what_builds_on_it_skipped(cli: CommandLine) -> None:
    with EmbeddedServer() as server:
        url = server.url
    outcome = cli("--remote-cache", url, "--remote-retries", 0, "doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["remote: connection, capabilities"] == "failed"
    assert statuses(outcome)["remote: small blobs"] == "skipped"
    assert outcome.json["passed"] is False
    assert "address" in found(outcome, "connection, capabilities")["remedy"]


def test_a_server_that_takes_no_updates_is_found(cli: CommandLine) -> None:
    with EmbeddedServer(options=ServerOptions(update_enabled=False)) as server:
        outcome = cli("--remote-cache", server.url, "doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["remote: connection, capabilities"] == "warning"
    assert statuses(outcome)["remote: action cache"] == "failed"
    assert statuses(outcome)["remote: big blobs"] == "ok"


def test_a_server_that_damages_blobs_is_found(cli: CommandLine) -> None:
    faults = FaultScript(Fault("BatchReadBlobs", flip_bit=1000, times=100))
    with EmbeddedServer(faults=faults) as server:
        outcome = cli("--remote-cache", server.url, "--remote-retries", 1, "doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["remote: small blobs"] == "failed"


def test_text_says_what_to_do(cli: CommandLine) -> None:
    with EmbeddedServer(options=ServerOptions(read_only=True)) as server:
        outcome = cli("--remote-cache", server.url, "doctor")
    assert outcome.exit_code == 13
    assert "let this client write to the server's CAS" in outcome.text


def test_a_folder_that_cannot_be_made_is_found(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    outcome = cli("--cache-dir", tmp_path / "file/cache", "doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["cache: folder"] == "failed"
    assert statuses(outcome)["cache: space"] == "skipped"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free disk space"),
        (errno.EDQUOT, "free disk space"),
        (errno.EACCES, "make the folder writable"),
        (errno.EROFS, "mount the file system writable"),
        (errno.EMFILE, "ulimit"),
        (errno.EIO, "another file system"),
    ],
)
def test_the_remedy_fits_the_cause(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(_self: FileCache, _digest: object, _data: object) -> None:
        with translate_os_errors("cannot write"):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileCache, "write", refuse)
    check = found(cli("doctor", "--json"), "write, read, verify")
    assert check["status"] == "failed"
    assert remedy in check["remedy"]


def test_a_folder_open_to_everyone_is_warned_of(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    outcome = cli("--cache-dir", tmp_path / "open", "doctor", "--json")
    assert outcome.exit_code == 0
    assert statuses(outcome)["cache: permissions"] == "warning"


def test_leases_that_do_not_hold_are_found(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __enter__(self) -> None: ...
        def __exit__(self, *_error: object) -> None: ...

    monkeypatch.setattr(FileCache, "lease", lambda _self, _digests: Nothing())
    outcome = cli("doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["cache: leases"] == "failed"


def test_a_cache_that_loses_blobs_is_found(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_self: FileCache, digest: object) -> bytes:
        raise NotFound(f"{digest} is gone")

    monkeypatch.setattr(FileCache, "read", lost)
    outcome = cli("doctor", "--json")
    assert statuses(outcome)["cache: write, read, verify"] == "failed"
    assert "is gone" in found(outcome, "write, read, verify")["detail"]


def test_a_wrong_clock_is_found(cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: real() + 3600)
    outcome = cli("doctor", "--json")
    assert outcome.exit_code == 13
    assert statuses(outcome)["cache: clock"] == "failed"


@pytest.mark.parametrize(
    ("free_bytes", "status"), [(1 << 20, "failed"), (1 << 30, "warning"), (1 << 40, "ok")]
)
def test_a_disk_that_fills_is_found(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, free_bytes: int, status: str
) -> None:
    real = os.statvfs

    def statvfs(path: Any) -> os.statvfs_result:
        fields = list(real(path))
        fields[1], fields[4] = 4096, free_bytes // 4096
        return os.statvfs_result(fields)

    monkeypatch.setattr(os, "statvfs", statvfs)
    outcome = cli("doctor", "--json")
    assert statuses(outcome)["cache: space"] == status


@pytest.mark.slow
def test_the_conformance_suite_runs_on_demand(cli: CommandLine, server: EmbeddedServer) -> None:
    outcome = cli("--remote-cache", server.url, "doctor", "--conformance", "--json")
    assert outcome.exit_code == 0, outcome.json
    assert sum(check["area"] == "conformance" for check in outcome.json["checks"]) > 10


@pytest.mark.slow
def test_the_conformance_suite_takes_a_login_from_a_netrc_file(cli: CommandLine, tmp_path: Path) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    basic = base64.b64encode(b"me:secret").decode()
    with EmbeddedServer(
        options=ServerOptions(required_headers={"authorization": f"Basic {basic}"})
    ) as server:
        outcome = cli("--remote-cache", server.url, "--netrc", netrc, "doctor", "--conformance", "--json")
    assert outcome.exit_code == 0, outcome
    assert sum(check["area"] == "conformance" for check in outcome.json["checks"]) > 10


def test_the_conformance_suite_refuses_a_server_name_of_its_own(
    cli: CommandLine, server: EmbeddedServer
) -> None:
    outcome = cli("--remote-cache", server.url, "--tls-server-name", "x", "doctor", "--conformance")
    assert outcome.exit_code == 2


def test_a_damaged_pin_is_found(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "xdg-cache/snaploader"
    with FileCache(folder) as cache:
        cache.pin("version-1")
    assert found(cli("doctor", "--json"), "pins")["status"] == "ok"
    (pin,) = folder.rglob("pins/version-1")
    pin.write_bytes(b"rot")
    outcome = cli("doctor", "--json")
    assert outcome.exit_code == 13
    assert str(pin) in found(outcome, "pins")["detail"]
