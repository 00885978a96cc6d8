"""Hooks: what is delivered, in which order, and that raising and hanging ones disturb nothing."""

from __future__ import annotations

import logging
import threading
from typing import Self

import pytest
from lifecycle_values import NOW

from snaploader.workspace import lifecycle
from snaploader.workspace.lifecycle import AuditRecord, HookDelivery, Hooks, Notification
from snaploader.workspace.model import WorkspaceState
from snaploader.workspace.policy import Transition


class Delivery(HookDelivery):
    """Counts what failed, and is closed at the end of a block."""

    def __init__(self, hooks: Hooks) -> None:
        self.failures = 0
        super().__init__(hooks, on_failure=self.count)

    def count(self) -> None:
        self.failures += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def notification(number: int = 0) -> Notification:
    return Notification(f"ws-{number}", "ada", Transition.AUTOSTOP, WorkspaceState.STOPPED, NOW)


def audit_record() -> AuditRecord:
    running, stopped = WorkspaceState.RUNNING, WorkspaceState.STOPPED
    return AuditRecord("ws-0", "ada", Transition.AUTOSTOP, "here", running, stopped, NOW)


def test_each_record_reaches_each_hook_of_its_kind_once_in_order():
    first, second, audited = [], [], []
    with Delivery(Hooks(notify=(first.append, second.append), audit=(audited.append,))) as delivery:
        for number in range(100):
            delivery.send(notification(number))
        delivery.send(audit_record())
    assert first == second == [notification(number) for number in range(100)]
    assert audited == [audit_record()]
    assert delivery.failures == 0


def test_nothing_is_started_where_there_is_no_hook():
    before = threading.active_count()
    with Delivery(Hooks(audit=(print,))) as delivery:
        delivery.send(notification())
        assert threading.active_count() == before


def test_a_hook_that_raises_is_logged_and_counted_and_the_others_are_called(caplog):
    seen = []

    def broken(record: Notification) -> None:
        raise SystemExit("mail server is gone")

    with Delivery(Hooks(notify=(broken, seen.append))) as delivery:
        delivery.send(notification(1))
        delivery.send(notification(2))
    assert seen == [notification(1), notification(2)]
    assert delivery.failures == 2
    assert "Notification of autostop of 'ws-1': SystemExit: mail server is gone" in caplog.text


def test_a_hook_that_hangs_holds_up_neither_sending_nor_closing(caplog):
    entered, release = threading.Event(), threading.Event()

    def hangs(record: Notification) -> None:
        entered.set()
        release.wait(300)

    delivery = Delivery(Hooks(notify=(hangs,)))
    try:
        delivery.send(notification(1))
        assert entered.wait(300)
        delivery.send(notification(2))
        delivery.send(notification(3))
        assert delivery.close(timeout_s=0.01) is False
        assert delivery.failures == 2
        assert "did not return within" in caplog.text
    finally:
        release.set()
    assert delivery.close() is True


def test_records_beyond_the_most_that_wait_are_dropped_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(lifecycle, "MAX_WAITING", 2)
    entered, release, seen = threading.Event(), threading.Event(), []

    def slow(record: Notification) -> None:
        entered.set()
        release.wait(300)
        seen.append(record.workspace_id)

    with Delivery(Hooks(notify=(slow,))) as delivery:
        delivery.send(notification(0))
        assert entered.wait(300)
        for number in (1, 2, 3):
            delivery.send(notification(number))
        assert delivery.failures == 1
        release.set()
    assert seen == ["ws-0", "ws-1", "ws-2"]
    assert "'ws-3': dropped" in caplog.text


def test_what_is_sent_after_closing_is_dropped_and_closing_is_repeatable(caplog):
    seen = []
    delivery = Delivery(Hooks(notify=(seen.append,)))
    assert delivery.close()
    with caplog.at_level(logging.WARNING):
        delivery.send(notification())
    assert delivery.close()
    assert seen == []
    assert delivery.failures == 1


def test_a_system_without_threads_to_give_drops_records_and_raises_nothing(monkeypatch, caplog):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with Delivery(Hooks(notify=(print,))) as delivery:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            delivery.send(notification(1))
        assert delivery.failures == 1
        delivery.send(notification(2))
    assert delivery.failures == 1


@pytest.mark.parametrize("record", [notification(), audit_record()])
def test_records_cannot_be_changed(record):
    with pytest.raises(AttributeError):
        record.workspace_id = "other"
