"""The conformance suite passes against the embedded server in every guise, and fails where it should."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from snaploader.digest import DigestFunction
from snaploader.testing import (
    PRESETS,
    EmbeddedServer,
    Fault,
    FaultScript,
    ServerOptions,
    conformance,
    like_nativelink,
)
from snaploader.testing.conformance import Check, CheckResult, Endpoint, Outcome

GUISES = {
    **{name: preset() for name, preset in PRESETS.items()},
    "memory": ServerOptions(),
    "disk": ServerOptions(),
    "verifying": ServerOptions(verify_reads=True),
    "blake3": ServerOptions(digest_functions=(DigestFunction.BLAKE3,)),
    "frozen": ServerOptions(update_enabled=False),
    "late": ServerOptions(early_return=False),
    "nativelink-verify": like_nativelink(verify_hash=True),
    "skippable": ServerOptions(zstd_skippable_frame=True),
}

# What a guise does not offer; every other check must pass.
_NO_ZSTD_STREAMS = {
    "streams_may_be_compressed",
    "compressed_reads_start_at_their_offset",
    "wrong_compressed_bytes_are_refused",
    "compressed_writes_may_have_several_frames",
}
_NO_ZSTD = {"batches_may_be_compressed", *_NO_ZSTD_STREAMS}
_NO_RESUME = {"broken_writes_can_be_resumed"}
_ALWAYS = {"health_is_told_in_the_standard_way"}  # only with `introspection`
_ENABLED = {"updates_are_refused_where_they_are_not_enabled", *_ALWAYS}
_RESULTS = {
    "results_come_back",
    "a_later_result_replaces_the_first",
    "results_of_many_chunks_come_back",
    "incomplete_results_are_not_found",
    "results_with_incomplete_trees_are_not_found",
}
SKIPPED = {
    "casd": _NO_ZSTD | _NO_RESUME | _ENABLED,
    "buildgrid": _NO_ZSTD | _NO_RESUME | _ENABLED,
    "bazel-remote": _NO_RESUME | _ENABLED,
    "nativelink": _NO_ZSTD | _ENABLED,
    "nativelink-verify": _NO_ZSTD | _ENABLED,
    "buildbarn": _NO_ZSTD | _NO_RESUME | _ENABLED,
    "frozen": _RESULTS | _ALWAYS,
    "disk": _ENABLED - _ALWAYS,
    "late": {"a_write_of_what_exists_may_end_early"} | _ENABLED,
}

# What a guise gets wrong, and what the detail says of it.
FAILED = {
    "nativelink": dict.fromkeys(
        ("wrong_bytes_are_refused_in_a_batch", "wrong_bytes_are_refused_in_a_stream"), "does not verify"
    ),
    "nativelink-verify": dict.fromkeys(
        (
            "stored_blobs_are_not_missing",
            "batches_give_back_the_bytes",
            "batches_and_streams_share_blobs",
            "an_absent_blob_does_not_spoil_a_batch",
            "wrong_bytes_are_refused_in_a_batch",
            "results_come_back",
        ),
        "hash batches with SHA-256",
    ),
}


@pytest.fixture(scope="module", params=sorted(GUISES))
def guise(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Endpoint]]:
    name = request.param
    storage = tmp_path_factory.mktemp("server") if name == "disk" else None
    with (
        EmbeddedServer(storage, GUISES[name], introspection=name == "disk") as server,
        Endpoint(server.url, instance_name="a/b" if name == "disk" else "") as endpoint,
    ):
        yield name, endpoint


@pytest.mark.may_leak  # the server outlives the test, and starts threads when it needs them
@pytest.mark.parametrize("check", conformance.CHECKS, ids=str)
def test_embedded_server_conforms(check: Check, guise: tuple[str, Endpoint]) -> None:
    name, endpoint = guise
    result = check.run(endpoint)
    expected = Outcome.SKIPPED if check.name in SKIPPED.get(name, _ENABLED) else Outcome.PASSED
    if check.name in FAILED.get(name, ()):
        expected = Outcome.FAILED
        assert FAILED[name][check.name] in result.detail
    assert result.outcome is expected, result.detail


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("unknown_blobs_are_missing", Fault("FindMissingBlobs", wrong_digest=True)),
        ("stored_blobs_are_not_missing", Fault("BatchUpdateBlobs", drop_blob=True)),
        ("batches_give_back_the_bytes", Fault("BatchReadBlobs", flip_bit=9)),
        ("batches_give_back_the_bytes", Fault("BatchReadBlobs", wrong_digest=True)),
        ("an_absent_blob_does_not_spoil_a_batch", Fault("BatchReadBlobs", item_status="OK")),
        ("wrong_bytes_are_refused_in_a_batch", Fault("BatchUpdateBlobs", item_status="OK")),
        ("streams_give_back_the_bytes", Fault("Read", truncate_after_bytes=0)),
        ("streams_give_back_the_bytes", Fault("Read", cut_after_bytes=1)),
        ("streams_may_be_compressed", Fault("Write", drop_blob=True)),
        ("reads_start_at_their_offset", Fault("Read", flip_bit=0)),
        ("results_come_back", Fault("UpdateActionResult", status="INTERNAL")),
        ("unknown_actions_are_not_found", Fault("GetActionResult", status="UNAVAILABLE")),
    ],
    ids=str,
)
def test_a_server_that_misbehaves_fails_the_check(check: str, fault: Fault) -> None:
    with EmbeddedServer(faults=FaultScript(fault)) as server, Endpoint(server.url) as endpoint:
        result = _check(check).run(endpoint)
        assert result.outcome is Outcome.FAILED
        assert result.detail
        assert server.faults.pending == []


def test_a_server_that_does_not_check_completeness_is_told_apart() -> None:
    with (
        EmbeddedServer(options=ServerOptions(check_completeness=False)) as server,
        Endpoint(server.url) as endpoint,
    ):
        for name in ("incomplete_results_are_not_found", "results_with_incomplete_trees_are_not_found"):
            assert _check(name).run(endpoint).outcome is Outcome.SKIPPED


def test_a_server_that_is_away_fails_every_check_and_raises_nothing() -> None:
    with EmbeddedServer() as server:
        url = server.url
    with Endpoint(url, timeout_s=5) as endpoint:
        results: list[CheckResult] = list(conformance.run(endpoint, conformance.CHECKS[:3]))
    assert [result.outcome for result in results] == [Outcome.FAILED] * 3
    assert all("UNAVAILABLE" in result.detail for result in results)


def _check(name: str) -> Check:
    return next(check for check in conformance.CHECKS if check.name == name)
