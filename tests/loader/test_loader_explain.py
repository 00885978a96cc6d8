"""`explain` says of each manifest what `get_snapshot` does with it, and changes nothing."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from loader_hosts import CHUNK, Host, HostFactory, image, metadata

from snaploader import (
    FileCache,
    NotFound,
    ReadSources,
    SnaploaderError,
    SnapshotKey,
    SnapshotKeySet,
    SnapshotLoader,
    SnapshotTask,
)
from snaploader.loader import Explanation, Rule
from snaploader.testing import EmbeddedServer, Fault, FaultScript

OLD_S = 100_000.0


def rules(found: Explanation) -> list[tuple[str, str, str]]:
    return [(one.key.ref, str(m.source), str(m.rule)) for one in found.keys for m in one.manifests]


def whole(writer: Host, here: Host) -> None:
    writer.save(image(1), "topic")
    writer.save(image(2), "main")


def nothing(writer: Host, here: Host) -> None:
    pass


def incomplete_there(writer: Host, here: Host) -> None:
    whole(writer, here)
    server = SERVER[0]
    table = writer.find("topic").tables["disk"]
    for index in (0, 1):
        server.delete_blob(table.get(index))


def stale_here(writer: Host, here: Host) -> None:
    here.save(image(3), "main", remote=False, vm_metadata=metadata(time.time() - OLD_S))


def stale_here_and_new_there(writer: Host, here: Host) -> None:
    stale_here(writer, here)
    whole(writer, here)


def incomplete_here(writer: Host, here: Host) -> None:
    here.save(image(3), "topic", remote=False)
    next(path for path in here.chunk_files() if path.stat().st_size == CHUNK).unlink()
    writer.save(image(2), "main")


def damaged_tree_there(writer: Host, here: Host) -> None:
    whole(writer, here)
    (tree,) = writer.find("topic").manifest.chunked_files.values()
    SERVER[0].corrupt_blob(tree)


def damaged_manifest_here(writer: Host, here: Host) -> None:
    here.cache.put_ref(here.loader.manifests.local_ref(here.keys("topic").branch_key), b"no manifest")


SERVER: list[EmbeddedServer] = []

STATES: list[Callable[[Host, Host], None]] = [
    nothing,
    whole,
    incomplete_there,
    stale_here,
    stale_here_and_new_there,
    incomplete_here,
    damaged_tree_there,
    damaged_manifest_here,
]


@pytest.mark.parametrize("allow_degraded", [False, True])
@pytest.mark.parametrize("policy", ["newest", "local-first", "local-only", "remote-only"])
@pytest.mark.parametrize("prepare", STATES)
def test_it_chooses_what_a_load_gets(
    make_host: HostFactory,
    server: EmbeddedServer,
    prepare: Callable[[Host, Host], None],
    policy: str,
    allow_degraded: bool,
) -> None:
    SERVER[:] = [server]
    writer, here = make_host("writer", server), make_host("here", server)
    prepare(writer, here)
    key_set = here.keys("topic")
    found = here.loader.explain(key_set, policy, allow_degraded=allow_degraded)
    if found.chosen is None:
        with pytest.raises(SnaploaderError) as caught:
            here.loader.get_snapshot(key_set, policy, allow_degraded=allow_degraded)
        is_unfinished = not (isinstance(caught.value, NotFound) or allow_degraded)
        assert bool(found.failure) is is_unfinished
        return
    snapshot = here.loader.get_snapshot(key_set, policy, allow_degraded=allow_degraded)
    assert (found.chosen_key, found.chosen.source) == (snapshot.key, snapshot.source)
    assert found.chosen.blobs == len(snapshot.digests())


def test_it_says_which_rule_decided(make_host: HostFactory, server: EmbeddedServer) -> None:
    writer, here = make_host("writer", server), make_host("here", server)
    incomplete_here(writer, here)
    here.save(image(4), "main", remote=False, vm_metadata=metadata(time.time() - OLD_S), snapshot_id="old")
    found = here.loader.explain(here.keys("topic"))
    assert rules(found) == [
        ("topic", "local", "incomplete"),
        ("topic", "remote", "absent"),
        ("main", "local", "stale"),
        ("main", "remote", "whole"),
    ]
    (lost, _), (old, chosen) = (one.manifests for one in found.keys)
    assert (lost.missing_blobs, lost.missing_bytes) == (1, CHUNK)
    assert lost.missing_example.endswith(f"/{CHUNK}")
    assert old.age_s == pytest.approx(OLD_S, abs=600)
    assert found.chosen is chosen
    assert (found.version_state, found.group_id) == ("current", "")
    text = str(found)
    for part in (lost.missing_example, old.name, chosen.name, "the limit is 86400 s", "chosen: the remote"):
        assert part in text
    assert pickle.loads(pickle.dumps(found)) == found
    assert found.to_dict()["keys"][1]["is_chosen"]


def test_it_changes_nothing(make_host: HostFactory, server: EmbeddedServer) -> None:
    writer, here = make_host("writer", server), make_host("here", server, clock=lambda: time.time())
    whole(writer, here)
    here.save(image(5), "other", remote=False)
    key_set = here.keys("topic")

    def state() -> dict[str, tuple[int, int, int]]:
        files = (path for path in Path(here.cache.root).rglob("*") if path.is_file() and path.name[0] != ".")
        return {str(path): (s.st_size, s.st_mtime_ns, s.st_ino) for path in files for s in [os.stat(path)]}

    before, results = state(), server.action_results()
    assert here.loader.explain(key_set).chosen is not None
    assert (state(), server.action_results()) == (before, results)
    with pytest.raises(NotFound):
        here.loader.get_snapshot(key_set, "local-only")


def test_a_damaged_local_manifest_stays(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(1))
    key_set = host.keys()
    name = host.loader.manifests.local_ref(key_set.branch_key)
    host.cache.put_ref(name, b"no manifest")
    ((one,),) = (key.manifests[:1] for key in host.loader.explain(key_set).keys)
    assert one.rule is Rule.DAMAGED
    assert host.cache.get_ref(name) == b"no manifest"


def test_an_outage_is_a_line(make_host: HostFactory) -> None:
    faults = FaultScript()
    with EmbeddedServer(faults=faults) as server:
        host = make_host("a", server)
        host.save(image(1), "main", vm_metadata=metadata(time.time()))
        key_set = host.keys("topic")
        faults.add(Fault("GetActionResult", status="UNAVAILABLE", times=None))
        found = host.loader.explain(key_set)
        assert ("topic", "remote", "failed") in rules(found)
        assert ("main", "local", "whole") in rules(found)
        assert found.chosen is None
        assert "cannot be looked at" in found.failure
        assert found.version_failure
        degraded = host.loader.explain(key_set, allow_degraded=True)
        assert degraded.chosen_key == key_set.fallback_keys[0]


def test_what_is_not_to_be_read_is_not_asked_for(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    server.clear_log()
    found = host.loader.explain(key_set, sources=ReadSources(remote_manifests=False, remote_chunks=False))
    assert rules(found) == [("main", "local", "whole"), ("main", "remote", "not-read")]
    # The version is not read of a snapshot: it is asked for.
    assert {call.method for call in server.requests} <= {"GetActionResult"}
    assert server.calls("GetActionResult") <= 1


def test_a_version_that_is_not_current_is_told(make_host: HostFactory, server: EmbeddedServer) -> None:
    host = make_host("a", server)
    host.save(image(1))
    key_set = host.keys()
    version = host.loader.invalidate_snapshot(key_set.branch_key)
    found = host.loader.explain(key_set)
    assert found.remote_version == version
    assert found.version_state == f"not current, which is {version}"


def test_debug_strings_have_whole_hashes_and_the_group(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    host = make_host("a", server, group="g1")
    host.save(image(1))
    key_set, snapshot = host.keys("topic"), host.find()
    local = host.loader.manifests.local_ref(snapshot.key)
    text = snapshot.debug_string("g1")
    for part in (
        local,
        "group 'g1'",
        snapshot.key.platform_hash,
        str(snapshot.manifest.chunked_files["disk"]),
    ):
        assert part in text
    assert text.splitlines()[0].split(" of key ")[1] in key_set.debug_string("g1")


def test_a_deletion_there_ends_the_search_and_one_here_does_not(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    a.save(image(1), snapshot_id="one")
    b.read(b.loader.get_snapshot_by_id("one"))
    a.loader.delete_snapshot("one")
    key = SnapshotKey(snapshot_id="one")
    key_set = SnapshotKeySet(key, (), key)
    found = b.loader.explain(key_set, "newest")
    assert rules(found) == [("", "remote", "deleted"), ("", "local", "whole")]
    assert (found.chosen, found.failure) == (None, "")
    with pytest.raises(NotFound):
        b.loader.get_snapshot(key_set, "newest")
    here_first = b.loader.explain(key_set, "local-first")
    assert here_first.chosen is not None
    assert here_first.version_state == "these keys have none"
    assert [m.rule for m in a.loader.explain(key_set).keys[0].manifests] == [Rule.DELETED, Rule.DELETED]


@pytest.mark.parametrize("damage", [b"garbage", b""])
def test_explaining_leaves_damaged_refs_where_they_are_and_says_so(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with FileCache(tmp_path / "cache") as cache, SnapshotLoader(cache) as loader:
        key_set = loader.snapshot_key_set(SnapshotTask(environment={"GIT_BRANCH": "main"}), "0" * 64)
        loader.cache_snapshot(key_set.write_key, files={"file": tmp_path / "file"})
        refs = [path for path in Path(cache.root).rglob("*") if path.is_file() and "refs" in path.parts]
        for path in refs:
            path.chmod(0o600)
            path.write_bytes(damage)
        for _ in range(2):
            explanation = loader.explain(key_set)
            assert explanation.keys[0].manifests[0].rule is Rule.DAMAGED
        assert all(path.read_bytes() == damage for path in refs)
