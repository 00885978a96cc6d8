"""Versions: minted once, read from the authority, renewed for all refs together."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from loader_hosts import HostFactory, image, task

from snaploader import keys
from snaploader._proto import remote_execution_pb2
from snaploader.digest import Digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound, Unavailable
from snaploader.testing import EmbeddedServer, Fault, FaultScript, ServerOptions


def test_all_hosts_agree_on_the_version(make_host: HostFactory, server: EmbeddedServer) -> None:
    version = make_host("a", server).keys().branch_key.version_id
    assert version
    assert make_host("b", server).keys("topic").branch_key.version_id == version


def test_without_a_server_the_version_lives_in_the_cache(make_host: HostFactory) -> None:
    version = make_host("a").keys().branch_key.version_id
    assert make_host("a").keys("topic").branch_key.version_id == version
    assert make_host("b").keys().branch_key.version_id != version


def test_invalidation_drops_every_branch_together(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b = make_host("a", server), make_host("b", server)
    for branch in ("main", "topic"):
        a.save(image(1), branch)
        b.load(branch)
    version = a.loader.invalidate_snapshot(a.keys("topic").branch_key)
    for host in (a, b):
        for branch in ("main", "topic"):
            assert host.keys(branch).branch_key.version_id == version
            with pytest.raises(NotFound):
                host.find(branch)


def test_invalidation_of_one_configuration_leaves_others(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(1))
    other = host.loader.snapshot_key_set(task(), "other-conf")
    host.loader.invalidate_snapshot(other.branch_key)
    assert host.load() == image(1)


def test_an_expired_version_is_a_clean_start(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    version = host.keys().branch_key.version_id
    for digest in server.action_results():
        server.delete_action_result(digest)
    assert host.keys().branch_key.version_id != version
    with pytest.raises(NotFound):
        host.find()


def test_two_loaders_that_mint_at_once_converge(make_host: HostFactory, server: EmbeddedServer) -> None:
    """Both see no version, both write; whoever reads back last adopts what stands."""
    a, b = make_host("a", server), make_host("b", server)
    assert a.remote is not None
    assert b.remote is not None
    both_missed = threading.Barrier(2, timeout=300)
    both_wrote = threading.Barrier(2, timeout=300)

    def interleave(host: Any) -> None:
        remote = host.remote
        get, update = remote.get_action_result, remote.update_action_result
        state = {"missed": False}

        def get_action_result(digest: Digest) -> remote_execution_pb2.ActionResult:
            try:
                return get(digest)
            except NotFound:
                if not state["missed"]:
                    state["missed"] = True
                    both_missed.wait()
                raise

        def update_action_result(digest: Digest, result: remote_execution_pb2.ActionResult) -> None:
            update(digest, result)
            both_wrote.wait()

        remote.get_action_result, remote.update_action_result = get_action_result, update_action_result

    versions: dict[str, str] = {}
    interleave(a)
    interleave(b)
    threads = [
        threading.Thread(target=lambda h=host, n=name: versions.update({n: h.keys().branch_key.version_id}))
        for name, host in (("a", a), ("b", b))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert versions["a"] == versions["b"]
    assert make_host("c", server).keys().branch_key.version_id == versions["a"]


def test_an_outage_does_not_bring_back_what_may_be_invalid(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(image(1))
    version = host.keys().branch_key.version_id
    server.stop()
    with pytest.raises(Unavailable):
        host.keys()
    stale = host.loader.snapshot_key_set(task(), "conf", allow_stale_version=True)
    assert stale.branch_key.version_id == version
    assert host.read(host.loader.get_snapshot(stale)) == image(1)


def test_a_readonly_loader_writes_no_version(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server, readonly=True)
    host.keys()
    assert server.calls("UpdateActionResult") == 0
    with pytest.raises(FailedPrecondition, match="read-only"):
        host.loader.invalidate_snapshot(host.keys().branch_key)


def test_a_server_that_takes_no_updates_gets_none(make_host: HostFactory) -> None:
    with EmbeddedServer(options=ServerOptions(update_enabled=False)) as server:
        host = make_host("a", server)
        assert host.keys().branch_key.version_id
        with pytest.raises(NotFound):
            host.find()


@pytest.mark.parametrize(
    "answer", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"]
)
def test_a_load_by_a_caller_who_may_only_read_is_a_miss(make_host: HostFactory, answer: str) -> None:
    with EmbeddedServer(faults=FaultScript(Fault("UpdateActionResult", status=answer, times=None))) as server:
        host = make_host("a", server)
        assert host.keys().branch_key.version_id
        with pytest.raises(NotFound):
            host.find()


def test_something_else_under_the_version_key_is_reported(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    assert host.remote is not None
    name = keys.version_key(host.keys().branch_key)
    result = remote_execution_pb2.ActionResult(stdout_raw=b"something else")
    host.remote.update_action_result(Digest(name, 1, host.remote.digest_function), result)
    with pytest.raises(DataLoss, match="no snapshot version"):
        host.keys()


def test_a_host_that_only_reads_finds_its_own_saves(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server, remote_readonly=True)
    host.save(image(1))
    assert host.load() == image(1)
    # So does another loader on the same folder, as after a restart.
    assert make_host("a", server, remote_readonly=True).load() == image(1)
    assert make_host("a", server, readonly=True).load() == image(1)
    assert server.calls("UpdateActionResult") == 0


@pytest.mark.parametrize("answer", ["FAILED_PRECONDITION", "PERMISSION_DENIED", "UNAUTHENTICATED"])
def test_a_host_whose_credentials_only_read_finds_its_own_saves_again(
    make_host: HostFactory, answer: str
) -> None:
    with EmbeddedServer(faults=FaultScript(Fault("UpdateActionResult", status=answer, times=None))) as server:
        host = make_host("a", server)
        host.save(image(1), remote=False)
        assert host.load() == image(1)


def test_a_version_of_its_own_ends_when_one_stands_remotely(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host, other = make_host("a", server, remote_readonly=True), make_host("b", server)
    host.save(image(1))
    own = host.keys().branch_key.version_id
    other.save(image(2))
    assert host.load() == image(2)
    # Expiry is a clean start, and never brings an old snapshot back.
    for name, result in server.action_results().items():
        if not result.output_directories:
            server.delete_action_result(name)
    fresh = host.keys().branch_key.version_id
    assert fresh != own
    with pytest.raises(NotFound):
        host.find()


def test_a_pin_keeps_the_version_of_its_own(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server, remote_readonly=True)
    host.save(image(1), pin="kept")
    host.cache.prune()
    assert host.load() == image(1)
