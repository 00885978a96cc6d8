"""The fake store behaves like a store, and counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.blobstore import RemoteStore, TransferStatistics, Upload
from snaploader.digest import Digest, DigestFunction, empty_digest
from snaploader.errors import DataLoss, FailedPrecondition, NotFound
from snaploader.testing import FakeCAS

DATA = [b"one", b"two", b"three"]
DIGESTS = [Digest.of(data, DigestFunction.SHA256) for data in DATA]


def test_blobs_go_in_and_come_out(tmp_path: Path) -> None:
    fake = FakeCAS()
    store: RemoteStore = fake
    (tmp_path / "two").write_bytes(b"two")
    store.write(DIGESTS[0], b"one")
    uploads = [Upload(DIGESTS[0], b"one"), Upload(DIGESTS[1], tmp_path / "two")]
    assert fake.upload_missing(uploads) == TransferStatistics(1, 3, 3, 1)
    assert store.write_many([Upload(DIGESTS[1], b"two")]) == TransferStatistics(1, 3, 3, 0)
    assert store.find_missing([*DIGESTS, empty_digest(DigestFunction.SHA256)]) == {DIGESTS[2]}
    got: dict[Digest, bytes] = {}
    store.read_many([*DIGESTS[:2], empty_digest(DigestFunction.SHA256)], got.__setitem__)
    assert sorted(got.values()) == [b"", b"one", b"two"]
    assert store.read(DIGESTS[0]) == b"one"
    streamed = bytearray()
    store.read_to(DIGESTS[1], streamed.extend)
    assert streamed == b"two"
    assert (fake.reads[DIGESTS[0]], fake.writes[DIGESTS[1]]) == (2, 2)
    assert fake.calls == {
        "write": 1,
        "upload_missing": 1,
        "write_many": 1,
        "find_missing": 1,
        "read_many": 1,
        "read": 1,
        "read_to": 1,
    }


def test_absent_and_wrong_blobs_are_errors() -> None:
    fake = FakeCAS()
    with pytest.raises(NotFound):
        fake.read(DIGESTS[0])
    fake.blobs[DIGESTS[0]] = b"eno"
    with pytest.raises(DataLoss):
        fake.read(DIGESTS[0])
    with pytest.raises(DataLoss):
        fake.write(DIGESTS[1], b"owt")


def test_action_results_are_copies() -> None:
    fake = FakeCAS()
    with pytest.raises(NotFound):
        fake.get_action_result(DIGESTS[0])
    result = reapi.ActionResult(stdout_raw=b"x")
    fake.update_action_result(DIGESTS[0], result)
    result.stdout_raw = b"y"
    assert fake.get_action_result(DIGESTS[0]).stdout_raw == b"x"
    with pytest.raises(FailedPrecondition):
        FakeCAS(update_enabled=False).update_action_result(DIGESTS[0], result)
