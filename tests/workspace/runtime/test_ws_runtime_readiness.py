"""Waiting for a workspace to be ready: each kind of check, the deadline, and the end of the process."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from snaploader.errors import Cancelled, DeadlineExceeded, FailedPrecondition, InvalidArgument
from snaploader.workspace.model import Readiness, WorkspaceSpec
from snaploader.workspace.runtime import ProbedWorkspace, ProcessRuntime
from snaploader.workspace.runtime.readiness import ReadinessProbe, probe_command, probe_http, probe_tcp

ID = "ws"
SLEEP = ("sleep", "1000")


def spec_of(
    kind: str, target: str = "", *, command: tuple[str, ...] = SLEEP, timeout_s: float = 10.0
) -> WorkspaceSpec:
    return WorkspaceSpec(
        ID,
        command=command,
        environment={"GREETING": "hello"},
        readiness=Readiness(kind=kind, target=target, interval_s=0.01, timeout_s=timeout_s),
    )


def started(runtime: ProcessRuntime, spec: WorkspaceSpec) -> WorkspaceSpec:
    runtime.create(spec)
    runtime.start(spec)
    return spec


@contextmanager
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that answers everything so; its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/health?full=1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def unused_port() -> int:
    with listening() as port:
        return port


def test_without_a_check_a_running_workspace_is_ready(runtime: ProcessRuntime) -> None:
    runtime.wait_ready(started(runtime, spec_of("none")), cancelled=threading.Event())


def test_tcp_is_ready_when_the_port_accepts(runtime: ProcessRuntime) -> None:
    with listening() as port:
        runtime.wait_ready(started(runtime, spec_of("tcp", f"127.0.0.1:{port}")))


def test_tcp_waits_until_the_port_accepts(runtime: ProcessRuntime, tmp_path: Path) -> None:
    tried = threading.Event()

    def probe(workspace: ProbedWorkspace, timeout_s: float) -> str:
        tried.set()
        return probe_tcp(workspace, timeout_s)

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        custom = ProcessRuntime(tmp_path / "runtime", durable=False, checks={"my-tcp": probe})
        spec = started(custom, spec_of("my-tcp", f"127.0.0.1:{server.getsockname()[1]}"))
        waiting = threading.Thread(target=custom.wait_ready, args=(spec,))
        waiting.start()
        assert tried.wait(300)
        server.listen()
        waiting.join(300)
        assert not waiting.is_alive()


@pytest.mark.parametrize("status", [200, 204, 302, 399])
def test_http_is_ready_at_a_status_of_200_to_399(status: int, runtime: ProcessRuntime) -> None:
    with answering(status) as url:
        runtime.wait_ready(started(runtime, spec_of("http", url)))


@pytest.mark.parametrize("status", [400, 404, 503])
def test_http_is_not_ready_at_other_statuses(status: int, runtime: ProcessRuntime) -> None:
    with answering(status) as url:
        spec = started(runtime, spec_of("http", url))
        with pytest.raises(DeadlineExceeded, match=f"HTTP status {status}"):
            runtime.wait_ready(spec, 0.5)


def test_a_command_is_ready_when_it_exits_with_0(runtime: ProcessRuntime) -> None:
    spec = started(runtime, spec_of("command", 'test "$GREETING" = hello && test -e ready'))
    (runtime.root(ID) / "ready").touch()
    runtime.wait_ready(spec)


def test_a_command_is_not_ready_otherwise(runtime: ProcessRuntime) -> None:
    spec = started(runtime, spec_of("command", "exit 3"))
    with pytest.raises(DeadlineExceeded, match="exit status 3"):
        runtime.wait_ready(spec, 0.5)


def test_a_check_of_ones_own_is_told_of_the_workspace(tmp_path: Path) -> None:
    seen: list[ProbedWorkspace] = []

    def probe(workspace: ProbedWorkspace, timeout_s: float) -> str:
        assert 0 < timeout_s <= 5
        seen.append(workspace)
        return "" if len(seen) == 3 else "not yet"

    runtime = ProcessRuntime(tmp_path, checks={"third-time": probe})
    runtime.wait_ready(started(runtime, spec_of("third-time", "anything")))
    runtime.stop(ID)
    assert len(seen) == 3
    assert seen[0].workspace_id == ID
    assert seen[0].target == "anything"
    assert seen[0].root == runtime.root(ID)
    assert seen[0].environment["GREETING"] == "hello"


def test_a_deadline_says_what_was_tried_and_how_it_failed(runtime: ProcessRuntime) -> None:
    target = f"127.0.0.1:{unused_port()}"
    spec = started(runtime, spec_of("tcp", target, timeout_s=0.05))
    with pytest.raises(DeadlineExceeded) as caught:
        runtime.wait_ready(spec)
    text = str(caught.value)
    assert "workspace 'ws' was not ready within 0.05 s" in text
    assert f"tcp {target!r}" in text
    assert "Connection refused" in text
    assert runtime.status(ID).is_running


def test_the_end_of_the_process_ends_the_wait_and_is_told(runtime: ProcessRuntime) -> None:
    command = ("sh", "-c", "for n in 1 2 3; do echo line $n; done; exit 7")
    spec = started(runtime, spec_of("tcp", f"127.0.0.1:{unused_port()}", command=command))
    with pytest.raises(FailedPrecondition) as caught:
        runtime.wait_ready(spec)
    assert "ended with exit code 7" in str(caught.value)
    assert "line 1\nline 2\nline 3" in str(caught.value)


def test_a_signal_that_ended_the_process_is_told(runtime: ProcessRuntime) -> None:
    spec = started(runtime, spec_of("command", "false", command=("sh", "-c", "kill -11 $$")))
    with pytest.raises(FailedPrecondition, match=r"ended by signal 11; it printed nothing"):
        runtime.wait_ready(spec)


def test_someone_elses_answer_does_not_count(tmp_path: Path) -> None:
    runtime = ProcessRuntime(tmp_path, durable=False)
    spec = spec_of("mine")

    def probe(workspace: ProbedWorkspace, timeout_s: float) -> str:
        runtime.stop(ID)
        return ""

    checked = ProcessRuntime(tmp_path, checks={"mine": probe}, durable=False)
    runtime.create(spec)
    runtime.start(spec)
    with pytest.raises(FailedPrecondition):
        checked.wait_ready(spec)


def test_a_wait_can_be_called_off(tmp_path: Path) -> None:
    cancelled = threading.Event()

    def probe(workspace: ProbedWorkspace, timeout_s: float) -> str:
        cancelled.set()
        return "never"

    runtime = ProcessRuntime(tmp_path, checks={"never": probe}, durable=False)
    spec = started(runtime, spec_of("never"))
    with pytest.raises(Cancelled):
        runtime.wait_ready(spec, 60, cancelled)
    runtime.stop(ID)


def test_a_workspace_without_a_command_is_probed_too(runtime: ProcessRuntime) -> None:
    spec = started(runtime, spec_of("command", "test -e ready", command=()))
    with pytest.raises(DeadlineExceeded):
        runtime.wait_ready(spec, 0.03)
    (runtime.root(ID) / "ready").touch()
    runtime.wait_ready(spec)


def test_an_unknown_kind_is_refused(runtime: ProcessRuntime) -> None:
    spec = started(runtime, spec_of("grpc"))
    with pytest.raises(InvalidArgument, match="'grpc'"):
        runtime.wait_ready(spec)


def probed(target: str, root: Path) -> ProbedWorkspace:
    return ProbedWorkspace(ID, target, root, {"PATH": "/bin:/usr/bin"})


def test_a_server_that_does_not_answer_is_not_ready(tmp_path: Path) -> None:
    with listening() as port:
        reason = probe_http(probed(f"http://127.0.0.1:{port}/", tmp_path), 0.05)
    assert "timed out" in reason


def test_a_server_that_speaks_something_else_is_not_ready(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        assert probe_http(probed(f"http://127.0.0.1:{server.getsockname()[1]}/", tmp_path), 5)
        thread.join()


def test_a_probe_that_hangs_is_killed(tmp_path: Path) -> None:
    reason = probe_command(probed(f"echo $$ > {tmp_path}/pid; sleep 1000 & wait", tmp_path), 0.1)
    assert reason == "it did not end within 0.1 s"


@pytest.mark.parametrize(
    ("probe", "target"), [(probe_tcp, f"{'x' * 70}.example:1"), (probe_http, "http://127.0.0.1:1/\u00fc")]
)
def test_a_target_that_cannot_be_sent_as_it_is_is_refused(
    probe: ReadinessProbe, target: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgument, match="is no"):
        probe(ProbedWorkspace(ID, target, tmp_path, {}), 1)


def test_a_command_check_of_a_workspace_without_a_folder_says_so(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert "No such file" in probe_command(ProbedWorkspace(ID, "true", gone, {}), 1)
