"""`snaploader cache`: the local cache itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from snaploader.cli.options import Group, command, destructive, option, shared_options
from snaploader.cli.output import record
from snaploader.cli.resources import Caches
from snaploader.cli.values import SIZE, format_size
from snaploader.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound, SnaploaderError

if TYPE_CHECKING:
    from snaploader.filecache import CacheEntry, FileCache

KINDS = ("blob", "private", "ref")
SHORTEST_PREFIX = 6


@click.group(cls=Group)
@shared_options
def cache(**_shared: object) -> None:
    """Look at the local cache, remove things from it, check it."""


@command("cache ls", group=cache)
@option("--kind", type=click.Choice(KINDS), help="Only entries of this kind.")
def list_(caches: Caches, kind: str | None) -> None:
    """List what the local cache holds of the group, least recently used first."""
    entries = sorted(
        (entry for entry in caches.file_cache.entries() if kind in {None, entry.kind}),
        key=lambda entry: (entry.last_used_s, entry.key),
    )
    disk_bytes = sum(entry.disk_bytes for entry in entries)
    allowed_bytes = caches.settings.max_cache_size
    caches.output.data(
        {
            "entries": [
                {
                    "kind": entry.kind,
                    "key": entry.key,
                    "digest": None if entry.digest is None else str(entry.digest),
                    "digest_function": None if entry.digest is None else entry.digest.function.name,
                    "disk_bytes": entry.disk_bytes,
                    "last_used": _time(entry),
                    "pinned": entry.pinned,
                }
                for entry in entries
            ],
            "disk_bytes": disk_bytes,
            "max_cache_size_bytes": allowed_bytes,
        }
    )
    for entry in entries:
        name = entry.key if entry.digest is None else str(entry.digest)
        pinned = "  pinned" if entry.pinned else ""
        size = format_size(entry.disk_bytes)
        caches.output.text(f"{entry.kind:<9}  {_time(entry)}  {size:>10}  {name}{pinned}")
    caches.output.detail(
        f"{len(entries)} entries, {format_size(disk_bytes)} on disk, {format_size(allowed_bytes)} allowed"
    )


@command("cache rm", group=cache)
@click.argument("names", nargs=-1, required=True, metavar="KEY…")
@option("--force", is_flag=True, help="Also what is pinned, which may exist nowhere else.")
@destructive
def remove(caches: Caches, names: tuple[str, ...], force: bool, yes: bool, dry_run: bool) -> None:
    """Remove entries by what `cache ls` calls them; a unique beginning is enough.

    What still needs them finds them missing, and fetches them again or starts cold. What is pinned is
    refused, and nothing removed then.
    """
    file_cache = caches.file_cache
    entries = list(file_cache.entries())
    chosen = {name: _match(name, entries) for name in names}
    pinned = [entry for entry in chosen.values() if entry.pinned]
    if pinned and not force:
        raise FailedPrecondition(
            f"{pinned[0].kind} {pinned[0].key} is pinned by {_pins_of(file_cache, pinned[0])}: it may exist "
            "nowhere else. Nothing was removed; --force removes it all the same"
        )
    if not _is_agreed(caches, "Remove", lambda: list(chosen.values()), yes=yes, dry_run=dry_run):
        return
    for entry in chosen.values():
        if entry.digest is not None:
            file_cache.remove(entry.digest)
        else:
            file_cache.delete_ref(entry.key)
    freed = sum(entry.disk_bytes for entry in chosen.values())
    caches.output.data(
        {"removed": [entry.key for entry in chosen.values()], "freed_bytes": freed},
        *(f"removed {entry.kind} {entry.key}" for entry in chosen.values()),
    )


@command("cache prune", group=cache)
@option("--target-size", type=SIZE, help="Size to come down to.  [default: --max-cache-size]")
@destructive
def prune(caches: Caches, target_size: int | None, yes: bool, dry_run: bool) -> None:
    """Remove what was used least recently, of all groups, until the cache is no larger than a size.

    What a running program needs stays, and so does what is pinned. A size of 0 removes all else.
    """
    file_cache = caches.file_cache
    target = caches.settings.max_cache_size if target_size is None else target_size
    if not _is_agreed(caches, "Evict", lambda: file_cache.prune_plan(target), yes=yes, dry_run=dry_run):
        return
    file_cache.prune(target)
    statistics = file_cache.statistics()
    freed, total = statistics.evicted_bytes, statistics.total_bytes
    caches.output.data(
        {"freed_bytes": freed, "disk_bytes": total},
        f"freed {format_size(freed)}; {format_size(total or 0)} remain",
    )


@command("cache verify", group=cache)
def verify(caches: Caches) -> None:
    """Hash every blob of the group, and read its refs and pins; what is wrong is taken out of use.

    Ends with exit code 10 when something was wrong. It is fetched again, or missed, when it is needed.
    A damaged pin stays, and nothing of the group is evicted until it is pinned again or unpinned.
    """
    report = caches.file_cache.verify()
    counts = record(report, "blobs", "content_bytes", "refs", "bad_refs", "pins", "bad_pins")
    bad_pin = "nothing is evicted until it is pinned again or unpinned"
    caches.output.data(
        {**counts, "bad_blobs": [str(digest) for digest in report.bad_blobs]},
        f"verified {report.blobs} blobs ({format_size(report.content_bytes)}) and {report.refs} refs",
        *(f"bad blob {digest}, now in quarantine" for digest in report.bad_blobs),
        *(f"bad ref {key}, now removed" for key in report.bad_refs),
        *(f"bad pin {name}: {bad_pin}" for name in report.bad_pins),
    )
    bad = len(report.bad_blobs) + len(report.bad_refs)
    if bad:
        raise DataLoss(
            f"{bad} entries of the cache were damaged and are out of use: check the disk of "
            f"{str(caches.settings.cache_folder)!r}"
        )
    if report.bad_pins:
        raise DataLoss(
            f"{len(report.bad_pins)} pins of the cache are damaged: pin again what they kept, or give it up "
            "with `snaploader cache unpin`"
        )


@command("cache pins", group=cache)
def pins(caches: Caches) -> None:
    """List what is pinned in the group, by name: it is never evicted."""
    file_cache = caches.file_cache
    rows = [_pin_row(file_cache, name) for name in file_cache.pins()]
    lines = [
        f"{row['name']}  damaged: nothing of the group is evicted"
        if row["damaged"]
        else f"{row['name']}  {row['blobs']} blobs, {format_size(row['content_bytes'])}, {row['refs']} refs"
        for row in rows
    ]
    caches.output.data({"pins": rows}, *lines)


@command("cache unpin", group=cache)
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
def unpin(caches: Caches, names: tuple[str, ...]) -> None:
    """Let go what is pinned under names, as `cache pins` lists them; even when a pin is damaged.

    What they kept may be evicted from then on, and may exist nowhere else: a workspace may lose a version.
    """
    file_cache = caches.file_cache
    absent = set(names) - set(file_cache.pins())
    if absent:
        raise NotFound(f"nothing is pinned as {min(absent)!r}: see `snaploader cache pins`")
    unpinned = [name for name in dict.fromkeys(names) if file_cache.unpin(name)]
    caches.output.data({"unpinned": unpinned}, *(f"unpinned {name}" for name in unpinned))


def _is_agreed(
    caches: Caches, verb: str, entries: Callable[[], Sequence[CacheEntry]], *, yes: bool, dry_run: bool
) -> bool:
    """Whether entries are to go; asks where somebody is there to answer. With --dry-run only tells which."""
    output = caches.output
    if not dry_run and not output.must_ask(yes=yes):
        return True
    going = entries()
    missing = caches.missing_remotely({entry.digest for entry in going if entry.digest is not None})
    # Refs and directories have other names on the server, and are not asked for.
    remote = [
        None if entry.digest is None or missing is None else entry.digest not in missing for entry in going
    ]
    freed = sum(entry.disk_bytes for entry in going)
    blobs = sum(entry.digest is not None for entry in going)
    known = "no server was asked" if missing is None else f"the server has {sum(map(bool, remote))}"
    summary = f"{len(going)} entries ({format_size(freed)}), {blobs} of them blobs, of which {known}"
    if not dry_run:
        if going:
            output.confirm(f"{verb} {summary}?")
        return True
    listed = list(zip(going, remote, strict=True))
    words = {None: "", True: "  on the server", False: "  not on the server"}
    lines = [
        f"{entry.kind} {entry.key}  {format_size(entry.disk_bytes)}{words[there]}" for entry, there in listed
    ]
    output.data(
        {
            "would_remove": [
                {**record(entry, "kind", "key", "disk_bytes"), "remote": there} for entry, there in listed
            ],
            "would_free_bytes": freed,
        },
        *(f"would remove {line}" for line in (*lines, summary)),
    )
    return False


def _pin_row(file_cache: FileCache, name: str) -> dict[str, Any]:
    """What one name keeps. Sizes that a pin does not tell count as nothing."""
    try:
        pin = file_cache.pinned(name)
    except SnaploaderError:
        return {"name": name, "blobs": 0, "content_bytes": 0, "refs": 0, "damaged": True}
    return {
        "name": name,
        "blobs": len(pin.hashes),
        "content_bytes": int(pin.sizes_bytes[pin.sizes_bytes > 0].sum()),
        "refs": len(pin.refs),
        "damaged": False,
    }


def _match(name: str, entries: Iterable[CacheEntry]) -> CacheEntry:
    """The one entry that `name` means."""
    prefix = name.partition("/")[0]
    if len(prefix) < SHORTEST_PREFIX:
        raise InvalidArgument(f"{name!r} is too short: give at least {SHORTEST_PREFIX} characters")
    found = [entry for entry in entries if entry.key.startswith(prefix)]
    if not found:
        raise NotFound(f"the local cache has no entry {name!r}: see `snaploader cache ls`")
    if len(found) > 1:
        raise InvalidArgument(f"{name!r} means {len(found)} entries: give more of it")
    return found[0]


def _pins_of(file_cache: FileCache, entry: CacheEntry) -> str:
    """The names of the pins that keep an entry, for people."""
    names = []
    for name in file_cache.pins():
        # One may go meanwhile, or be damaged.
        with suppress(NotFound, DataLoss):
            if file_cache.pinned(name).keeps(entry.key):
                names.append(name)
    return ", ".join(map(repr, names)) or "nothing any more"


def _time(entry: CacheEntry) -> str:
    return datetime.fromtimestamp(int(entry.last_used_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
