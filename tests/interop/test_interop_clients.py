"""Clients of other projects against the embedded server."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from thirdparty import buildgrid_python, casd

from snaploader._proto import remote_execution_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.errors import NotFound
from snaploader.remote import RemoteCache
from snaploader.testing import EmbeddedServer

pytestmark = pytest.mark.interop
SIZES = [1, 4096, 300_000, (5 << 20) + 3]


def blob(size: int) -> tuple[Digest, bytes]:
    content = random.Random(size).randbytes(size)
    return Digest.of(content, DigestFunction.SHA256), content


@pytest.mark.xdist_group("casd")
def test_casd_as_a_proxy_passes_blobs_and_results_both_ways(tmp_path: Path) -> None:
    with (
        EmbeddedServer() as server,
        casd(
            tmp_path, f"--cas-remote=http://{server.address}", f"--ac-remote=http://{server.address}"
        ) as proxy,
        RemoteCache(proxy.url) as near,
        RemoteCache(server.url, digest_function=DigestFunction.SHA256) as far,
    ):
        for size in SIZES:
            digest, content = blob(size)
            far.write(digest, content)
            assert near.read(digest) == content
            digest, content = blob(size + 1)
            near.write(digest, content)
            assert far.read(digest) == content

        result = remote_execution_pb2.ActionResult(exit_code=3)
        result.output_files.add(path="file").digest.MergeFrom(
            remote_execution_pb2.Digest(hash=digest.hash, size_bytes=digest.size_bytes)
        )
        key, _ = blob(77)
        with pytest.raises(NotFound):
            near.get_action_result(key)
        near.update_action_result(key, result)
        assert far.get_action_result(key).exit_code == 3
        assert near.get_action_result(key).output_files[0].digest.hash == digest.hash


@pytest.mark.xdist_group("buildgrid")
def test_the_client_of_buildgrid_uploads_and_downloads(tmp_path: Path) -> None:
    with (
        EmbeddedServer() as server,
        RemoteCache(server.url, digest_function=DigestFunction.SHA256) as remote,
    ):
        client = [str(buildgrid_python()), "-c", "from buildgrid.server.app import cli; cli()", "cas"]
        client += ["--remote", f"http://{server.address}"]
        blobs = dict(map(blob, SIZES))
        sources = {digest: tmp_path / f"source-{digest.size_bytes}" for digest in blobs}
        targets = {digest: tmp_path / f"target-{digest.size_bytes}" for digest in blobs}
        for digest, content in blobs.items():
            sources[digest].write_bytes(content)

        run([*client, "upload-file", "--verify", *map(str, sources.values())])
        for digest, content in blobs.items():
            assert remote.read(digest) == content

        wanted = [word for digest, path in targets.items() for word in (str(digest), str(path))]
        run([*client, "download-file", "--verify", *wanted])
        for digest, content in blobs.items():
            assert targets[digest].read_bytes() == content


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
