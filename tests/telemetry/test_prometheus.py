"""The example configuration, the alerts and the dashboard, by themselves and with a real Prometheus."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, start_http_server
from telemetry_hosts import CHUNK, Host, MakeHost

from snaploader import PrometheusMetrics
from snaploader.metrics import METRICS

FOLDER = Path(__file__).resolve().parent.parent.parent / "docs" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
TIMEOUT_S = 120.0
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
SAMPLES = {name + suffix for name, metric in METRICS.items() for suffix in SUFFIXES[metric.kind]}


def expressions() -> list[str]:
    """What the dashboard asks Prometheus, with its variables filled in."""
    panels = DASHBOARD["panels"]
    asked = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return [each.replace("$__rate_interval", "30s").replace("$job", "snaploader") for each in asked]


def test_the_dashboard_and_the_alerts_name_metrics_that_there_are() -> None:
    for page in ("grafana-dashboard.json", "alerts.yml"):
        used = set(re.findall(r"\bsnaploader_\w+", (FOLDER / page).read_text()))
        assert used
        assert used <= SAMPLES, page


def test_the_dashboard_shows_every_metric() -> None:
    asked = " ".join(expressions())
    assert [name for name in METRICS if name not in asked] == []


def test_the_panels_of_the_dashboard_have_numbers_of_their_own() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.fixture
def prometheus(tmp_path: Path, registry: CollectorRegistry) -> Iterator[str]:
    """The URL of a Prometheus that runs with the example configuration, and asks `registry` each second."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    with metrics_endpoint(registry) as target, free_port() as port:
        text = (FOLDER / "prometheus.yml").read_text()
        assert text.count("127.0.0.1:9464") == 1
        text = text.replace("127.0.0.1:9464", target).replace("15s", "1s")
        (tmp_path / "prometheus.yml").write_text(text)
        shutil.copy(FOLDER / "alerts.yml", tmp_path)
        listen = f"127.0.0.1:{port}"
        command = [
            program,
            f"--config.file={tmp_path / 'prometheus.yml'}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address={listen}",
        ]
        log = tmp_path / "prometheus.log"
        with log.open("wb") as stderr, subprocess.Popen(command, stderr=stderr) as process:
            try:
                wait_until_ready(f"http://{listen}", process, log)
                yield f"http://{listen}"
            finally:
                process.terminate()


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@contextlib.contextmanager
def metrics_endpoint(registry: CollectorRegistry) -> Iterator[str]:
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    yield port


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/-/ready", timeout=TIMEOUT_S):
            return
        threading.Event().wait(0.1)
    pytest.fail(f"Prometheus was not ready in time: {log.read_text()}")


def ask(url: str, path: str, **parameters: str) -> Any:
    """The data of an answer of Prometheus' HTTP API; an error of an expression fails the test."""
    try:
        with urllib.request.urlopen(
            f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=TIMEOUT_S
        ) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{parameters}: {error.read().decode()}")


def has_data(url: str, expression: str) -> bool:
    found = ask(url, "query", query=expression)["result"]
    return any(not math.isnan(float(sample["value"][1])) for sample in found)


def work(saver: Host, reader: Host, seed: int) -> None:
    """Save something new here, and load it there, both lazily and in full."""
    content = random.Random(seed).randbytes(8 * CHUNK) + bytes(CHUNK)
    saver.save(content)
    with reader.loader.unpack_snapshot(reader.find_newest(), reader.folder / f"lazy-{seed}") as unpacked:
        disk = unpacked.chunked_files["disk"]
        assert disk.read_at(0, disk.size) == content
        disk.write_at(10, b"changed")
    big = random.Random(-seed).randbytes(5 << 20)
    saver.save(big[:CHUNK], files={"kernel": saver.write("kernel", big)})
    reader.loader.restore_snapshot(reader.find_newest(), reader.folder / f"whole-{seed}")


@pytest.mark.interop
def test_prometheus_answers_every_expression_of_the_dashboard(
    prometheus: str, registry: CollectorRegistry, make_host: MakeHost
) -> None:
    metrics = PrometheusMetrics(registry)
    saver, reader = make_host("a", metrics), make_host("b", metrics)
    waiting = expressions()
    deadline = time.monotonic() + TIMEOUT_S
    seed = 0
    while waiting and time.monotonic() < deadline:
        seed += 1
        work(saver, reader, seed)
        waiting = [each for each in waiting if not has_data(prometheus, each)]
    assert waiting == []
    (group,) = ask(prometheus, "rules")["groups"]
    assert len(group["rules"]) == (FOLDER / "alerts.yml").read_text().count("- alert:")
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    (target,) = ask(prometheus, "targets")["activeTargets"]
    assert target["health"] == "up"


@pytest.mark.interop
def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    subprocess.run([promtool, "check", "config", FOLDER / "prometheus.yml"], check=True)
