"""What a snapshot says of itself, what a load tells of others, and who gets an id."""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pytest
from loader_hosts import CONFIGURATION, HostFactory, image, metadata, task

from snaploader import (
    CallContext,
    InvalidArgument,
    RequestMetadata,
    SnapshotIdTaken,
    SnapshotKey,
    SnapshotMetadata,
    VMMetadata,
)
from snaploader.testing import EmbeddedServer

NOW_S = 1_700_000_000.5
NOW = datetime.fromtimestamp(NOW_S, UTC)


def test_the_loader_completes_the_metadata(make_host: HostFactory) -> None:
    host = make_host("a", clock=lambda: NOW_S)
    key = host.keys("topic").write_key
    ran = task("topic", task_id="t", action_digest="ab/1")
    asks = RequestMetadata(tool_invocation_id="inv")
    given = VMMetadata(vm_id="vm", properties={"a": "b"})
    host.save(
        image(1),
        "topic",
        key=key,
        task=ran,
        recycled=True,
        snapshot_id="s1",
        vm_metadata=given,
        context=CallContext(request_metadata=asks),
    )
    snapshot = host.find("topic")
    assert snapshot.metadata == SnapshotMetadata(
        "s1", key, "vm", NOW, True, "t", "inv", "ab/1", NOW, {"a": "b"}
    )
    assert given == VMMetadata(vm_id="vm", properties={"a": "b"})


def test_what_the_caller_says_stands(make_host: HostFactory) -> None:
    host = make_host("a", clock=lambda: NOW_S)
    given = VMMetadata(snapshot_id="mine")
    given.created_timestamp.FromSeconds(5)
    given.last_executed_task.invocation_id = "first"
    asks = CallContext(request_metadata=RequestMetadata(tool_invocation_id="second"))
    host.save(image(1), vm_metadata=given, snapshot_id="s1", context=asks)
    found = host.find().metadata
    assert (found.snapshot_id, found.invocation_id, found.completed) == ("mine", "first", None)
    assert found.created == datetime.fromtimestamp(5, UTC)


def test_metadata_of_another_type_stays_as_it_is(make_host: HostFactory) -> None:
    host = make_host("a")
    host.save(image(1), vm_metadata=CONFIGURATION)
    assert host.find().metadata is None
    with pytest.raises(InvalidArgument, match="recycled"):
        host.save(image(1), vm_metadata=CONFIGURATION, recycled=True)


def test_odd_metadata_is_not_said() -> None:
    message = VMMetadata()
    message.created_timestamp.seconds = 1 << 60
    message.snapshot_key.ref = "x" * 5000
    found = SnapshotMetadata.from_message(message)
    assert (found.created, found.key, found.completed) == (None, None, None)


def test_a_fallback_says_what_it_passed_over_and_why(
    make_host: HostFactory, server: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    host = make_host("a", server)
    host.save(image(1), "main", snapshot_id="older", vm_metadata=metadata(time.time()))
    host.save(image(2), "topic", snapshot_id="newer", remote=False)
    lost = host.find("topic").tables["disk"].get(0)
    host.cache.remove(lost)
    caplog.set_level(logging.INFO, "snaploader")
    snapshot = host.find("topic")
    (passed,) = snapshot.passed_over
    assert (passed.key.ref, passed.source, passed.metadata.snapshot_id) == ("topic", "local", "newer")
    assert str(lost) in passed.reason
    assert pickle.loads(pickle.dumps(snapshot)).passed_over == snapshot.passed_over
    assert "found snapshot 'older'" in caplog.text
    assert "passed over snapshot 'newer'" in caplog.text


def test_a_save_is_logged(make_host: HostFactory, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "snaploader")
    make_host("a").save(image(1), snapshot_id="s1")
    assert "saved snapshot 's1' of" in caplog.text


def test_an_id_that_another_host_takes_meanwhile_is_that_hosts(
    make_host: HostFactory, server: EmbeddedServer
) -> None:
    a, b = make_host("a", server), make_host("b", server)
    path = a.folder / "disk.img"
    path.write_bytes(image(1))

    def rival_of(snapshot_id: str) -> Callable[[object], None]:
        def rival(progress: object) -> None:
            if getattr(progress, "stage", "") == "upload" and not done:
                done.append(progress)
                b.save(image(2), "other", snapshot_id=snapshot_id)

        return rival

    done: list[object] = []
    result = a.save(chunked_files={"disk": path}, snapshot_id="run", progress=rival_of("run"))
    assert done
    assert (result.snapshot_id_taken, result.saved_remotely) == (True, True)
    assert make_host("c", server).load() == image(1)
    c = make_host("d", server)
    assert c.read(c.loader.get_snapshot_by_id("run")) == image(2)
    with pytest.raises(SnapshotIdTaken):
        c.save(image(3), snapshot_id="run")
    # Where the key names no branch, there is nothing else to find the snapshot by.
    done.clear()
    path.write_bytes(image(4))
    with pytest.raises(SnapshotIdTaken, match="during this save"):
        a.save(key=SnapshotKey(), chunked_files={"disk": path}, snapshot_id="2", progress=rival_of("2"))
