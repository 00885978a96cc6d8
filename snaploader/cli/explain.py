"""`snaploader explain`: why a task gets the snapshot that it gets, or none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from snaploader.cli.lookup import Lookup, key_name
from snaploader.cli.options import ReadOptions, command, read_options
from snaploader.cli.resources import Caches
from snaploader.cli.values import format_size
from snaploader.keys import SnapshotKey, SnapshotKeySet
from snaploader.loader import Explanation, ManifestExplanation


@command("explain")
@read_options
def explain(caches: Caches, read_options: ReadOptions) -> None:
    """Tell what is under every key of a task, here and remotely, and which rule decides on each.

    Changes nothing in any cache. Ends with code 0 also when there is no snapshot, or the server is away, as
    long as this host knows the version of the keys.
    """
    looking = Lookup(caches, read_options, readonly=True, allow_stale_version=True)
    key_set = looking.key_set
    if key_set is None:
        key = SnapshotKey(instance_name=looking.instance_name, snapshot_id=read_options.snapshot_id)
        key_set = SnapshotKeySet(key, (), key)
    found = looking.loader.explain(
        key_set,
        looking.read_policy,
        sources=read_options.sources,
        allow_degraded=read_options.allow_degraded,
    )
    output = caches.output
    output.data(found.to_dict(), f"version   {found.version_id or '(none)'}: {found.version_state}")
    output.table(
        {
            "key": "key",
            "manifest": "source",
            "rule": "rule",
            "snapshot": "snapshot_id",
            "age>": "age",
            "size>": "size",
            "missing>": "missing",
            "why": "reason",
        },
        list(_rows(found)),
    )
    output.text(f"chosen    {_chosen(found)}")
    for one in found.keys:
        for manifest in one.manifests:
            output.detail(f"{key_name(one.key)}: {manifest.source} manifest {manifest.name}")


def _rows(found: Explanation) -> Iterator[dict[str, Any]]:
    for one in found.keys:
        for manifest in one.manifests:
            yield {
                "key": key_name(one.key),
                "source": str(manifest.source),
                "rule": str(manifest.rule) + (" (chosen)" if manifest is found.chosen else ""),
                "snapshot_id": manifest.snapshot_id or "-",
                "age": "-" if manifest.age_s is None else f"{manifest.age_s:.0f} s",
                "size": format_size(manifest.blob_bytes) if manifest.blobs else "-",
                "missing": _missing(manifest),
                "reason": manifest.reason or manifest.missing_example or "-",
            }


def _missing(manifest: ManifestExplanation) -> str:
    if not manifest.missing_blobs:
        return "-"
    return f"{manifest.missing_blobs} blobs, {format_size(manifest.missing_bytes)}"


def _chosen(found: Explanation) -> str:
    if found.chosen is None or found.chosen_key is None:
        return f"none: {found.failure}" if found.failure else "none"
    return f"{key_name(found.chosen_key)} from the {found.chosen.source} cache"
