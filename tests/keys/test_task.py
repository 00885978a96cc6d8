from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from snaploader._proto import remote_execution_pb2 as reapi
from snaploader.errors import InvalidArgument
from snaploader.keys import MAX_PROPERTIES, MAX_TEXT_BYTES, SnapshotTask


def action(**properties: str) -> reapi.Action:
    message = reapi.Action()
    message.platform.SetInParent()
    for name, value in properties.items():
        message.platform.properties.add(name=name, value=value)
    return message


def command(environment: dict[str, str] | None = None, **properties: str) -> reapi.Command:
    message = reapi.Command()
    for name, value in (environment or {}).items():
        message.environment_variables.add(name=name, value=value)
    for name, value in properties.items():
        message.platform.properties.add(name=name, value=value)
    return message


def test_the_order_of_properties_and_variables_does_not_matter() -> None:
    first = SnapshotTask.from_mapping({"OS": "linux", "Arch": "arm"}, {"A": "1", "B": "2"})
    second = SnapshotTask.from_mapping([("Arch", "arm"), ("OS", "linux")], {"B": "2", "A": "1"})
    assert first == second
    assert hash(first) == hash(second)
    assert first.platform == (("Arch", "arm"), ("OS", "linux"))


def test_a_property_may_have_several_values() -> None:
    task = SnapshotTask.from_mapping([("Pool", "b"), ("Pool", "a")])
    assert task.platform == (("Pool", "a"), ("Pool", "b"))


def test_later_changes_to_what_was_given_do_not_reach_the_task() -> None:
    environment = {"GIT_BRANCH": "main"}
    task = SnapshotTask.from_mapping({}, environment)
    environment["GIT_BRANCH"] = "other"
    assert task.environment["GIT_BRANCH"] == "main"
    with pytest.raises(TypeError):
        task.environment["GIT_BRANCH"] = "other"  # type: ignore[index]


def test_a_task_survives_pickling() -> None:
    task = SnapshotTask.from_mapping({"OS": "linux"}, {"A": "1"}, instance_name="i", task_id="t")
    assert pickle.loads(pickle.dumps(task)) == task


def test_the_platform_of_the_action_wins() -> None:
    task = SnapshotTask.from_messages(action(OS="linux"), command(OS="windows"))
    assert task.platform == (("OS", "linux"),)


def test_an_empty_platform_of_the_action_wins_when_it_is_set() -> None:
    assert SnapshotTask.from_messages(action(), command(OS="windows")).platform == ()


def test_the_platform_of_the_command_counts_when_the_action_has_none() -> None:
    assert SnapshotTask.from_messages(reapi.Action(), command(OS="linux")).platform == (("OS", "linux"),)


def test_environment_instance_and_action_come_from_their_messages() -> None:
    request = reapi.ExecuteRequest(
        instance_name="prod", action_digest=reapi.Digest(hash="ab" * 32, size_bytes=7)
    )
    task = SnapshotTask.from_messages(
        None, command({"GIT_BRANCH": "main"}), request, task_id="t", invocation_id="i"
    )
    assert dict(task.environment) == {"GIT_BRANCH": "main"}
    assert (task.instance_name, task.task_id, task.invocation_id) == ("prod", "t", "i")
    assert task.action_digest == "ab" * 32 + "/7"


def test_an_instance_name_that_is_given_wins() -> None:
    request = reapi.ExecuteRequest(instance_name="prod")
    assert SnapshotTask.from_messages(execute_request=request, instance_name="test").instance_name == "test"
    assert SnapshotTask.from_messages(execute_request=request, instance_name="").instance_name == ""


def test_no_messages_make_an_empty_task() -> None:
    assert SnapshotTask.from_messages() == SnapshotTask()


class ActionWithoutPlatform:
    """As stubs of REAPI 2.1 and before have it."""

    def HasField(self, name: str) -> bool:
        raise ValueError(f"no field {name}")


def test_stubs_from_before_actions_had_a_platform_are_fine() -> None:
    task = SnapshotTask.from_messages(ActionWithoutPlatform(), command(OS="linux"))
    assert task.platform == (("OS", "linux"),)


def test_any_objects_with_the_right_attributes_will_do() -> None:
    pair = SimpleNamespace
    task = SnapshotTask.from_messages(
        pair(platform=None),
        pair(
            platform=pair(properties=[pair(name="OS", value="linux")]),
            environment_variables=[pair(name="A", value="1")],
        ),
    )
    assert task == SnapshotTask.from_mapping({"OS": "linux"}, {"A": "1"})


def test_of_a_variable_with_two_values_the_first_counts() -> None:
    message = command()
    for value in ("b", "b", "a"):
        message.environment_variables.add(name="GIT_BRANCH", value=value)
    assert SnapshotTask.from_messages(command=message).environment == {"GIT_BRANCH": "b"}


@pytest.mark.parametrize(
    "arguments",
    [
        {"platform": {"a\0b": "x"}},
        {"platform": {"a": "x\0"}},
        {"platform": {"a" * (MAX_TEXT_BYTES + 1): "x"}},
        {"platform": {"a": "é" * (32 << 10) + "x"}},
        {"platform": {"a": "\ud800"}},
        {"platform": {str(n): "" for n in range(MAX_PROPERTIES + 1)}},
        {"environment": {str(n): "" for n in range(MAX_PROPERTIES + 1)}},
        {"instance_name": "\0"},
        {"task_id": "x" * (MAX_TEXT_BYTES + 1)},
    ],
)
def test_what_cannot_be_part_of_a_key_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        SnapshotTask.from_mapping(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"platform": {"a": 1}},
        {"platform": {b"a": "x"}},
        {"environment": {"a": None}},
        {"instance_name": None},
    ],
)
def test_what_is_no_string_is_a_type_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        SnapshotTask.from_mapping(**arguments)
