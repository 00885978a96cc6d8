"""Templates: what a workspace takes from a version, and what an update to another one changes."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from lifecycle_values import NOW, workspace

from snaploader.errors import InvalidArgument
from snaploader.workspace.model import Readiness, Resources, Volume, WorkspaceSpec
from snaploader.workspace.templates import (
    Template,
    TemplateVersion,
    check_version,
    is_to_be_updated,
    made_from,
    updated,
)

HOUR = timedelta(hours=1)
FIRST = TemplateVersion(
    "web",
    1,
    WorkspaceSpec(
        "",
        ("serve",),
        {"PORT": "80", "OLD": "1"},
        (Volume("data", "/data"),),
        Readiness("tcp", "127.0.0.1:80"),
        "debian:12",
        ("/dev/kvm",),
        Resources(2, 1 << 30),
        {"team": "web"},
    ),
    NOW,
    "gentle",
    HOUR,
)
SECOND = TemplateVersion(
    "web",
    2,
    WorkspaceSpec(
        "",
        ("serve", "--fast"),
        {"PORT": "8080", "NEW": "2"},
        (Volume("other", "/other"),),
        Readiness("tcp", "127.0.0.1:8080"),
        "debian:13",
        (),
        Resources(4, 2 << 30),
        {"team": "net"},
    ),
    NOW,
    "strict",
    2 * HOUR,
)


def made(own: WorkspaceSpec, **values):
    values = {"policy": FIRST.policy, "ttl": FIRST.ttl, "template_version": 1, "base": "web", **values}
    return replace(workspace(), spec=made_from(FIRST, own), **values)


def test_a_workspace_is_made_as_the_version_says():
    spec = made_from(FIRST, WorkspaceSpec("one"))
    assert spec == replace(FIRST.spec, workspace_id="one")


def test_what_is_given_besides_takes_the_place_of_what_the_version_says():
    own = WorkspaceSpec(
        "one",
        ("own",),
        {"PORT": "9", "MINE": "x"},
        (Volume("mine", "/mine"),),
        Readiness("command", "true"),
        "mine:1",
        ("/dev/own",),
        Resources(vcpus=8),
        {"mine": "y"},
    )
    assert made_from(FIRST, own) == replace(
        own,
        environment={"PORT": "9", "OLD": "1", "MINE": "x"},
        resources=Resources(8, 1 << 30),
        labels={"team": "web", "mine": "y"},
    )


def test_an_update_changes_all_that_is_as_the_version_says_but_for_volumes():
    after = updated(made(WorkspaceSpec("one")), FIRST, SECOND)
    assert after.spec == replace(SECOND.spec, workspace_id="one", volumes=FIRST.spec.volumes)
    assert (after.policy, after.ttl, after.template_version) == ("strict", 2 * HOUR, 2)


def test_an_update_leaves_what_a_workspace_has_of_its_own():
    own = WorkspaceSpec(
        "one",
        ("own",),
        {"PORT": "9", "MINE": "x"},
        readiness=Readiness("command", "true"),
        image="mine:1",
        devices=("/dev/own",),
        resources=Resources(vcpus=8),
        labels={"mine": "y"},
    )
    after = updated(made(own, policy="default", ttl=None), FIRST, SECOND)
    assert after.spec == replace(
        own,
        environment={"PORT": "9", "NEW": "2", "MINE": "x"},
        volumes=FIRST.spec.volumes,
        resources=Resources(8, 2 << 30),
        labels={"team": "net", "mine": "y"},
    )
    assert (after.policy, after.ttl) == ("default", None)


def test_an_update_there_and_back_is_none():
    before = made(WorkspaceSpec("one", environment={"MINE": "x"}, image="mine:1"))
    assert updated(updated(before, FIRST, SECOND), SECOND, FIRST) == before


TO_BE_UPDATED = {
    "it asks for updates": (True, False, 1, True),
    "the template requires it": (False, True, 1, True),
    "both": (True, True, 1, True),
    "nobody asks": (False, False, 1, False),
    "it has the active version": (True, True, 2, False),
    "the active version is an earlier one": (True, False, 3, True),
    "it was made from no template": (True, True, None, False),
}


@pytest.mark.parametrize(
    ("asks", "required", "has", "expected"), TO_BE_UPDATED.values(), ids=TO_BE_UPDATED.keys()
)
def test_a_workspace_is_updated_when_it_or_its_template_wants_it(asks, required, has, expected):
    template = Template("web", 2, 3, required)
    one = workspace(base="web", template_version=has, automatic_updates=asks)
    assert is_to_be_updated(one, template) is expected


@pytest.mark.parametrize(
    "changes",
    [
        {"template": " "},
        {"template": "x" * 201},
        {"message": "two\nlines"},
        {"ttl": timedelta(0)},
        {"spec": WorkspaceSpec("", labels={"": "empty"})},
        {"spec": WorkspaceSpec("", volumes=(Volume("a", "relative"),))},
    ],
)
def test_a_version_of_which_no_workspace_could_be_made_is_refused(changes):
    with pytest.raises(InvalidArgument):
        check_version(replace(FIRST, **changes))


def test_a_version_is_put_into_normal_form():
    given = replace(FIRST, template=" web ", spec=replace(FIRST.spec, volumes=(Volume("data", "//data/"),)))
    assert check_version(given) == FIRST
