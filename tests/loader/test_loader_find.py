"""Which key serves, from which tier, and what the caller hears of those that did not."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from loader_hosts import CHUNK, HostFactory, image, metadata, task

from snaploader import RemoteCache, SnapshotLoader, SnapshotTask, TLSConfig, keys
from snaploader._proto.remote_execution_pb2 import ActionResult
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, Unavailable
from snaploader.loader.results import ManifestSource
from snaploader.testing import EmbeddedServer, Fault, FaultScript


def test_a_stacked_pull_request_falls_back_in_order(make_host: HostFactory, server: EmbeddedServer) -> None:
    saver, reader = make_host("a", server), make_host("b", server)
    with pytest.raises(NotFound):
        reader.find("feature-2", base="feature-1")
    for branch, seed in (("main", 1), ("feature-1", 2), ("feature-2", 3)):
        saver.save(image(seed), branch)
        snapshot = reader.find("feature-2", base="feature-1")
        assert snapshot.key.ref == branch
        assert reader.read(snapshot) == image(seed)
        assert not snapshot.degraded


def test_a_merge_queue_task_saves_for_the_next_pull_request(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    queue = host.keys("gh-readonly-queue/release/1.0/pr-7")
    host.save(image(1), key=queue.write_key)
    assert host.find("pr-8", base="release/1.0", default="").key.ref == "release/1.0"


def test_the_final_error_names_every_key_and_its_reason(make_host: HostFactory) -> None:
    with pytest.raises(NotFound) as caught:
        make_host("a").find("topic", base="stack")
    for part in ("topic", "stack", "main", "no local manifest"):
        assert part in str(caught.value)


@pytest.mark.parametrize("policy", [None, "", "freshest"])
def test_a_missing_or_unknown_read_policy_is_an_error(make_host: HostFactory, policy: str) -> None:
    host = make_host("a")
    with pytest.raises((InvalidArgument, TypeError)):
        host.loader.get_snapshot(host.keys(), policy)


def test_local_first_prefers_the_local_manifest(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1))
    assert b.find().source is ManifestSource.REMOTE
    a.save(image(2))
    snapshot = b.find()
    assert snapshot.source is ManifestSource.LOCAL
    assert b.read(snapshot) == image(1)


def test_newest_prefers_the_remote_manifest_and_does_not_keep_it(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1))
    b.load()
    a.save(image(2))
    assert b.load(policy="newest") == image(2)
    assert b.load(policy="local-first") == image(1)


def test_newest_falls_back_on_the_local_manifest(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1), remote=False)
    assert host.find(policy="newest").source is ManifestSource.LOCAL


def test_local_only_asks_the_server_for_nothing(make_host: HostFactory, server: EmbeddedServer) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1))
    keys_of_b = b.keys()
    before = server.total_calls()
    with pytest.raises(NotFound):
        b.loader.get_snapshot(keys_of_b, "local-only")
    assert server.total_calls() == before
    key_set = a.keys()
    before = server.total_calls()
    assert a.read(a.loader.get_snapshot(key_set, "local-only")) == image(1)
    assert server.total_calls() == before


@pytest.mark.parametrize(
    ("age_s", "is_used"), [(0, True), (24 * 3600 - 60, True), (24 * 3600 + 60, False), (None, False)]
)
def test_a_stale_local_fallback_is_not_used(
    make_host: HostFactory, age_s: float | None, is_used: bool
) -> None:
    host = make_host("a")
    host.save(image(1), vm_metadata=None if age_s is None else metadata(time.time() - age_s))
    assert host.find("main").key.ref == "main"
    if is_used:
        assert host.find("topic").key.ref == "main"
    else:
        with pytest.raises(NotFound, match="older than"):
            host.find("topic")


def test_a_stale_local_fallback_gives_way_to_the_remote_one(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    b.save(image(1), vm_metadata=metadata(time.time() - 90_000), remote=False)
    a.save(image(2), vm_metadata=metadata(time.time()))
    snapshot = b.find("topic")
    assert snapshot.source is ManifestSource.REMOTE
    assert b.read(snapshot) == image(2)


def test_the_universal_ref_is_the_last_fallback_and_ages(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a = make_host("a", server, universal_ref=True)
    a.save(image(1), "topic", vm_metadata=metadata(time.time()))
    snapshot = make_host("b", server, universal_ref=True).find("other")
    assert keys.is_universal(snapshot.key)
    a.save(image(2), "topic", vm_metadata=metadata(time.time() - 90_000))
    with pytest.raises(NotFound, match="older than"):
        make_host("c", server, universal_ref=True).find("other")


def test_groups_do_not_see_each_other_across_restarts(make_host: HostFactory) -> None:
    host = make_host("a", group="one")
    host.save(image(1))
    for _ in range(2):
        assert make_host("a", group="one").load() == image(1)
        with pytest.raises(NotFound):
            make_host("a", group="two").find()


def test_instances_do_not_see_each_other(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    for loader in (host.loader, make_host("b", server).loader):
        other = loader.snapshot_key_set(task(instance_name="other"), "conf")
        with pytest.raises(NotFound):
            loader.get_snapshot(other)


def test_without_sharing_runners_do_not_see_each_other(make_host: HostFactory) -> None:
    loader = make_host("a", share_snapshots=False).loader
    one = loader.snapshot_key_set(task(), "conf", "runner-1")
    assert one.branch_key.ref == ""
    make_host("a", share_snapshots=False).save(image(1), key=one.write_key)
    assert loader.get_snapshot(one).key.runner_id == "runner-1"
    with pytest.raises(NotFound):
        loader.get_snapshot(loader.snapshot_key_set(task(), "conf", "runner-2"))


def test_local_only_is_about_manifests(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    for digest in host.find().tables["disk"].digests():
        host.cache.remove(digest)
    asked = server.calls("GetActionResult")
    assert host.read(host.loader.get_snapshot(key_set, "local-only")) == image(1)
    assert server.calls("GetActionResult") == asked
    other = make_host("b", server)
    with pytest.raises(NotFound, match="no local manifest"):
        other.loader.get_snapshot(key_set, "local-only")


def test_a_task_cannot_ask_for_the_sharing_that_its_host_does_not_offer(make_host: HostFactory) -> None:
    loader = make_host("a", share_snapshots=False).loader
    wishing = SnapshotTask.from_mapping({"snapshot-sharing": "true"}, {"GIT_BRANCH": "main"})
    assert loader.snapshot_key_set(wishing, "conf", "r").branch_key.runner_id == "r"
    with pytest.raises(InvalidArgument, match="runner_id"):
        loader.snapshot_key_set(wishing, "conf")
    modest = SnapshotTask.from_mapping({"snapshot-sharing": "false"}, {"GIT_BRANCH": "main"})
    assert make_host("b").loader.snapshot_key_set(modest, "conf", "r").branch_key.runner_id == "r"


@pytest.mark.parametrize("remote", [None, True])
def test_what_belongs_to_one_runner_is_shared_only_when_asked_for(
    make_host: HostFactory, server: EmbeddedServer, remote: bool | None
) -> None:
    host = make_host("a", server, share_snapshots=False)
    key_set = host.loader.snapshot_key_set(task(), "conf", "runner-1")
    result = host.save(image(1), key=key_set.write_key, remote=remote)
    assert result.saved_remotely == bool(remote)
    assert ("runner-1" in result.remote_skipped) == (remote is None)
    assert bool(server.blobs()) == bool(remote)
    derived = host.loader.derive_snapshot(host.loader.get_snapshot(key_set))
    assert not derived.saved_remotely


def test_a_host_may_use_the_remote_cache_and_publish_nothing_there(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(1))
    before = server.action_results()
    host = make_host("b", server, remote_readonly=True)
    assert host.load() == image(1)
    result = host.save(image(2), snapshot_id="mine")
    assert (result.saved_locally, result.saved_remotely) == (True, False)
    assert "remote_readonly" in result.remote_skipped
    assert host.load() == image(2)
    derived = host.loader.derive_snapshot(host.find())
    assert not derived.saved_remotely
    key = host.keys().write_key
    assert key is not None
    for refused in (
        lambda: host.save(image(3), remote=True),
        lambda: host.loader.derive_snapshot(host.find(), remote=True),
        lambda: host.loader.delete_snapshot("mine"),
        lambda: host.loader.invalidate_snapshot(key),
    ):
        with pytest.raises(FailedPrecondition, match="remote_readonly"):
            refused()
    other = host.loader.snapshot_key_set(task(), "another configuration")
    assert other.branch_key.version_id
    assert host.loader.delete_snapshot("mine", remote=False).deleted_locally
    assert server.action_results() == before


def test_a_snapshot_is_found_by_its_id_after_newer_ones(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    first = host.save(image(1))
    host.save(image(2))
    host.loader.invalidate_snapshot(host.keys().branch_key)
    for reader in (host, make_host("b", server)):
        assert reader.read(reader.loader.get_snapshot_by_id(first.snapshot_id)) == image(1)
    with pytest.raises(NotFound, match="never-saved"):
        host.loader.get_snapshot_by_id("never-saved")
    with pytest.raises(InvalidArgument):
        host.loader.get_snapshot_by_id("")


def test_a_damaged_local_manifest_is_replaced_from_remote(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    host.save(image(1))
    name = keys.local_manifest_key("", host.keys().branch_key)
    host.cache.put_ref(name, b"\xff\xff not a manifest")
    assert host.find().source is ManifestSource.REMOTE
    assert host.find().source is ManifestSource.LOCAL


def test_a_corrupt_remote_tree_is_an_error_and_not_a_miss(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(1), "main")
    a = make_host("a", server)
    a.save(image(2), "topic")
    snapshot = a.find("topic")
    tree = snapshot.manifest.chunked_files["disk"]
    # In the last digit of the file's size: still a tree of which a server finds every chunk.
    server.corrupt_blob(tree, 8 * (tree.size_bytes - 1))
    with pytest.raises(DataLoss):
        make_host("b", server).find("topic")


def test_damage_locally_gives_way_to_the_remote_manifest(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    b.save(image(1))
    a.save(image(2))
    tree = b.find(policy="local-only").manifest.chunked_files["disk"]
    b.cache.remove(tree)
    server.corrupt_blob(tree, 8 * (tree.size_bytes - 1))
    snapshot = b.find()
    assert snapshot.source is ManifestSource.REMOTE
    assert b.read(snapshot) == image(2)


def test_a_cache_without_room_for_manifests_still_loads(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    make_host("a", server).save(image(1))
    host = make_host("b", server, max_bytes=CHUNK)
    with host.cache.lease([host.find().manifest.chunked_files["disk"]]):
        assert host.load() == image(1)


def test_an_outage_is_raised_and_not_taken_for_a_miss(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(1), "main", vm_metadata=metadata(time.time()))
        host = make_host("b", server)
        key_set = host.keys("topic")
        host.loader.get_snapshot(key_set)
        faults.add(Fault("GetActionResult", status="UNAVAILABLE", times=1000))
        with pytest.raises(Unavailable, match="topic"):
            host.loader.get_snapshot(key_set)
        snapshot = host.loader.get_snapshot(key_set, allow_degraded=True)
        assert snapshot.degraded
        assert snapshot.key.ref == "main"
        assert isinstance(snapshot.failures[0].error, Unavailable)
        assert host.read(snapshot) == image(1)


def test_a_short_outage_is_sat_out(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        make_host("a", server).save(image(1))
        host = make_host("b", server)
        key_set = host.keys()
        faults.add(Fault("GetActionResult", status="UNAVAILABLE", times=2))
        assert not host.loader.get_snapshot(key_set).degraded


def test_a_readonly_loader_keeps_no_manifest(make_host: HostFactory, server: EmbeddedServer) -> None:
    make_host("a", server).save(image(1))
    host = make_host("b", server, readonly=True)
    assert host.load() == image(1)
    assert host.find().source is ManifestSource.REMOTE


def test_keys_of_another_version_miss(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(1))
    key_set = host.keys()
    other = replace(key_set, branch_key=replace(key_set.branch_key, version_id="other"), fallback_keys=())
    with pytest.raises(NotFound):
        host.loader.get_snapshot(other)


def test_platform_properties_steer_sharing_and_the_universal_fallback(make_host: HostFactory) -> None:
    loader = make_host("a").loader
    plain = loader.snapshot_key_set(task(), "conf")

    def keys_with(**properties: str) -> keys.SnapshotKeySet:
        platform = {"OSFamily": "linux", **{name.replace("_", "-"): v for name, v in properties.items()}}
        wishing = SnapshotTask.from_mapping(platform, {"GIT_BRANCH": "main"})
        return loader.snapshot_key_set(wishing, "conf", "runner-1")

    universal = keys_with(snapshot_universal_fallback="true")
    assert universal.branch_key == plain.branch_key
    assert keys.is_universal(universal.fallback_keys[-1])
    assert keys_with(snapshot_sharing="false").branch_key.runner_id == "runner-1"
    with pytest.raises(InvalidArgument, match="snapshot-sharing"):
        keys_with(snapshot_sharing="perhaps")


def test_a_save_with_a_universal_key_set_updates_the_universal_ref(make_host: HostFactory) -> None:
    host = make_host("a")
    platform = {"OSFamily": "linux", "snapshot-universal-fallback": "true"}
    for branch in ("one", "two"):
        wishing = SnapshotTask.from_mapping(platform, {"GIT_BRANCH": branch})
        key_set = host.loader.snapshot_key_set(wishing, "conf")
        if branch == "one":
            host.save(image(1), key=key_set.write_key, key_set=key_set, vm_metadata=metadata(time.time()))
    assert keys.is_universal(host.loader.get_snapshot(key_set).key)


def test_a_remote_manifest_that_is_none_is_damage_and_not_wrong_usage(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server)
    key_set = host.keys()
    assert host.remote is not None
    digest = keys.remote_manifest_digest(key_set.branch_key, host.remote.digest_function)
    host.remote.update_action_result(digest, ActionResult(stdout_raw=b"something else"))
    with pytest.raises(DataLoss, match="manifest is damaged"):
        host.loader.get_snapshot(key_set)
    assert host.save(image(1)).saved_remotely


def test_a_missing_certificate_is_not_taken_for_a_missing_snapshot(make_host: HostFactory) -> None:
    host = make_host("a")
    key_set = host.keys()
    tls = TLSConfig(certificate="/proc/nope")
    with (
        RemoteCache("grpcs://127.0.0.1:1", tls=tls) as remote,
        SnapshotLoader(host.cache, remote) as loader,
        pytest.raises(InvalidArgument, match="/proc/nope"),
    ):
        loader.get_snapshot(key_set)
