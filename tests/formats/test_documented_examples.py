"""The worked examples in docs/formats are what the code does."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from snaploader._proto import snaploader_pb2
from snaploader.digest import Digest, DigestFunction
from snaploader.formats.chunktable import ChunkTable, encode_tree
from snaploader.formats.dirtree import (
    DirectoryEntry,
    DirectoryTree,
    FileEntry,
    SymlinkEntry,
    encode_directory_tree,
)
from snaploader.formats.manifest import Manifest, PlainFile, pack_any
from snaploader.keys import (
    SnapshotKey,
    SnapshotTask,
    local_manifest_key,
    platform_hash,
    remote_manifest_digest,
    snapshot_key_set,
    version_key,
)
from snaploader.loader.manifests import local_tombstone, tombstone_result
from snaploader.policy import POLICY_PROPERTIES

DOCS = Path(__file__).parents[2] / "docs" / "formats"
SHA256 = DigestFunction.SHA256

pytestmark = pytest.mark.skipif(not DOCS.is_dir(), reason="the documentation is not part of this checkout")


def example(page: str, first_line: str) -> bytes:
    """The bytes of a block of a page: all that is hexadecimal up to the first three spaces after it."""
    text = (DOCS / page).read_text()
    block = next(
        block for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) if block.startswith(first_line)
    )
    lines = (re.match(r"\s*((?:[0-9a-f]{2,} {0,2})*)", line) for line in block.split("\n\n")[0].splitlines())
    return bytes.fromhex("".join(line[1] for line in lines if line).replace(" ", ""))


def test_the_example_of_a_key() -> None:
    page = (DOCS / "keys.md").read_text()
    task = SnapshotTask.from_mapping(
        {"OSFamily": "linux", "Arch": "amd64", "snapshot-save-policy": "always"},
        {"GIT_BRANCH": "feature", "GIT_REPO_DEFAULT_BRANCH": "main"},
        instance_name="ci",
    )
    key = snapshot_key_set(task, "c0ffee", version_id="v1").branch_key
    platform = example("keys.md", "0a 0d 0a04")
    assert hashlib.sha256(platform).hexdigest() == platform_hash(task.platform) == key.platform_hash
    assert example("keys.md", "0a02 6369") == key.serialize()
    by_id = SnapshotKey("ci", snapshot_id="s1")
    assert "`0a02 6369 3202 7331`" in page
    assert by_id.serialize().hex() == "0a02636932027331"
    for name in (
        platform_hash(task.platform),
        hashlib.sha256(key.serialize()).hexdigest(),
        local_manifest_key("", key),
        remote_manifest_digest(key, SHA256).hash,
        remote_manifest_digest(by_id, SHA256).hash,
        version_key(key),
        *POLICY_PROPERTIES,
    ):
        assert name in page


def test_the_example_of_a_snapshot() -> None:
    hashes = hashlib.sha256(b"a" * 4096).digest() + hashlib.sha256(b"b" * 3616).digest()
    rows = np.frombuffer(hashes, np.uint8).reshape(2, 32)
    tree = encode_tree(ChunkTable(20_000, 4096, SHA256, np.array([0, 4]), rows))
    assert example("manifest.md", "0a c101") == tree
    snapshot = Manifest(
        pack_any(snaploader_pb2.VMConfiguration(cpu_count=2)),
        SHA256,
        {"greeting": PlainFile(Digest.of(b"hello\n", SHA256), mode=0o644)},
        {"disk": Digest.of(tree, SHA256)},
        pack_any(snaploader_pb2.VMMetadata(vm_id="vm")),
    )
    assert example("manifest.md", "12 57") == snapshot.serialize()
    assert snapshot.serialize_local() == bytes.fromhex("0801129902") + snapshot.serialize()


def test_the_example_of_a_tombstone() -> None:
    tombstone = tombstone_result("run-1", 1_700_000_000)
    serialised = tombstone.SerializeToString(deterministic=True)
    assert example("manifest.md", "4a 40") == serialised
    assert local_tombstone(tombstone) == bytes.fromhex("1242") + serialised


def test_the_example_of_a_directory() -> None:
    written_ns = 1_700_000_000 * 10**9
    tree = DirectoryTree(
        {
            "": DirectoryEntry(0o755, written_ns),
            "bin": DirectoryEntry(0o755, written_ns),
            "bin/hi": FileEntry(Digest.of(b"hello\n", SHA256), 0o755, written_ns + 500_000_000),
            "sh": SymlinkEntry("bin/hi", written_ns),
        },
        SHA256,
    )
    assert example("directories.md", "0a 74") == encode_directory_tree(tree)
