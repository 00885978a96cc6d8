"""Groups beside a model of them: what is done in one, through one cache or after a restart, stays there."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field

from filecache_helpers import blob, key
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from snaploader.context import CallContext
from snaploader.digest import Digest
from snaploader.errors import NotFound
from snaploader.filecache import FileCache

GROUPS = ("", "a", "b", "A")
BLOBS = dict(blob(number, 100) for number in range(3))
REFS = [key(f"ref {number}") for number in range(2)]
PINS = ["one", "two"]

groups = st.sampled_from(GROUPS)
digests = st.sampled_from(list(BLOBS))
refs = st.sampled_from(REFS)
pins = st.sampled_from(PINS)


@dataclass
class Group:
    """What a group has, as it ought to be."""

    blobs: set[Digest] = field(default_factory=set)
    refs: dict[str, bytes] = field(default_factory=dict)
    pins: dict[str, tuple[Digest, str]] = field(default_factory=dict)


class Groups(RuleBasedStateMachine):
    """One cache, whose calls name groups, and a dictionary of groups."""

    def __init__(self):
        super().__init__()
        self.root = tempfile.mkdtemp()
        self.model = {group: Group() for group in GROUPS}
        self.cache = FileCache(self.root)

    def teardown(self):
        self.cache.close()
        shutil.rmtree(self.root)

    @rule(group=groups, by_default=st.booleans())
    def restart(self, group, by_default):
        """The new cache has a group of its own, which calls that name another do not work in."""
        self.cache.close()
        options = {"context": CallContext(group_id=group)} if by_default else {"group_id": group}
        self.cache = FileCache(self.root, **options)
        assert self.cache.group_id == group
        assert set(self.cache.refs()) == self.model[group].refs.keys()

    @rule(group=groups, digest=digests)
    def put(self, group, digest):
        """A blob is new in a group though another has it."""
        added = self.cache.put_verified(digest, BLOBS[digest], context=CallContext(group_id=group))
        assert added == (digest not in self.model[group].blobs)
        self.model[group].blobs.add(digest)

    @rule(group=groups, other=groups, digest=digests)
    def write_within_a_call_of_another_group(self, group, other, digest):
        """A writer works in the group of the call that made it."""
        writer = self.cache.writer(digest, context=CallContext(group_id=group))
        with CallContext(group_id=other).use(), writer:
            writer.write(BLOBS[digest])
            writer.commit()
        self.model[group].blobs.add(digest)

    @rule(group=groups, digest=digests)
    def remove(self, group, digest):
        """Removing a blob leaves those of other groups."""
        removed = self.cache.remove(digest, context=CallContext(group_id=group))
        assert removed == (digest in self.model[group].blobs)
        self.model[group].blobs.discard(digest)

    @rule(group=groups, ref=refs, value=st.binary(max_size=4))
    def put_ref(self, group, ref, value):
        """A ref is set in one group."""
        self.cache.put_ref(ref, value, context=CallContext(group_id=group))
        self.model[group].refs[ref] = value

    @rule(group=groups, ref=refs)
    def delete_ref(self, group, ref):
        """A ref is deleted in one group."""
        deleted = self.cache.delete_ref(ref, context=CallContext(group_id=group))
        assert deleted == (self.model[group].refs.pop(ref, None) is not None)

    @rule(group=groups, name=pins, digest=digests, ref=refs)
    def pin(self, group, name, digest, ref):
        """A pin keeps what is in its group."""
        self.cache.pin(name, [digest], refs=[ref], context=CallContext(group_id=group))
        self.model[group].pins[name] = digest, ref

    @rule(group=groups, name=pins)
    def unpin(self, group, name):
        """A pin goes in one group."""
        unpinned = self.cache.unpin(name, context=CallContext(group_id=group))
        assert unpinned == (self.model[group].pins.pop(name, None) is not None)

    @precondition(lambda self: any(group.pins for group in self.model.values()))
    @rule(group=groups, leased=groups, digest=digests)
    def prune(self, group, leased, digest):
        """An eviction, in whichever group it is asked for, leaves what is pinned or leased."""
        with self.cache.lease([digest], context=CallContext(group_id=leased)):
            self.cache.prune(context=CallContext(group_id=group))
        for there in self.model.values():
            kept = {pinned for pinned, _ in there.pins.values()}
            there.blobs &= kept | {digest}
            there.refs = {
                ref: value
                for ref, value in there.refs.items()
                if ref in {pinned for _, pinned in there.pins.values()}
            }

    @invariant()
    def groups_have_what_they_ought_to(self):
        """Whatever can be asked of a group tells of that group alone."""
        for group, there in self.model.items():
            context = CallContext(group_id=group)
            assert set(BLOBS) - self.cache.find_missing(list(BLOBS), context=context) == there.blobs
            assert self.cache.pins(context=context) == sorted(there.pins)
            entries = self.cache.entries(context=context)
            assert {entry.digest for entry in entries if entry.kind == "blob"} == there.blobs
            assert {entry.key for entry in entries if entry.kind == "ref"} == there.refs.keys()
            pinned = {digest.hash for digest, _ in there.pins.values()} | {
                ref for _, ref in there.pins.values()
            }
            assert {entry.key for entry in entries if entry.pinned} == pinned & {one.key for one in entries}
            for ref in REFS:
                try:
                    assert self.cache.get_ref(ref, context=context) == there.refs.get(ref)
                except NotFound:
                    assert ref not in there.refs
            found = self.cache.verify(context=context)
            assert (found.blobs, found.refs, found.pins) == (
                len(there.blobs),
                len(there.refs),
                len(there.pins),
            )


TestGroups = Groups.TestCase
