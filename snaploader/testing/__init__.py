"""Tools for testing against the Remote Execution API; also what `snaploader serve` runs.

    from snaploader.testing import EmbeddedServer, Fault, FaultScript

    faults = FaultScript(Fault("BatchReadBlobs", status="UNAVAILABLE", times=2))
    with EmbeddedServer(faults=faults) as server:
        remote = RemoteCache(server.url)
        ...
        assert server.calls("BatchReadBlobs") == 3

`EmbeddedServer` keeps its content in memory or in a folder; `ServerOptions` and its presets (`like_casd()`
and others) take abilities away; `FaultScript` makes calls fail, slow, cut or lie, always the same way, and
with a `Link` they share a bandwidth; `FakeCAS` is a remote store without a network.
`snaploader.testing.conformance` checks any server:

    with conformance.Endpoint("grpc://127.0.0.1:8980") as endpoint:
        results = list(conformance.run(endpoint))

Its docstring shows how to run it from pytest.
"""

from snaploader._lazy import attach as _attach

__getattr__, __dir__ = _attach(__name__, globals())
