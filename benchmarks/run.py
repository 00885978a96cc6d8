"""Measure the loader against the floors of this machine, and save the figures as JSON.

    python -m benchmarks.run [--size-mib 2048] [--casd PATH] [--output benchmarks/results/loader.json]

Each figure stands beside its baseline, which is measured in the same run: shared machines are noisy,
so read the ratios. Scratch space (about six times the size) is taken in --scratch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc

import snaploader
from benchmarks import floors, hosts, images
from benchmarks.floors import Cost, timed
from cow import COWStore
from snaploader import SaveResult, SnapshotKeySet, SnapshotLoader
from snaploader._proto import remote_execution_pb2 as reapi
from snaploader._proto.services import CAS, methods
from snaploader.formats.chunktable import decode_tree, encode_tree
from snaploader.remote import tune_malloc

MIB = 1 << 20
CHUNK = 512 << 10
BATCH = MIB


class Report:
    """Collects figures and prints them as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, name: str, cost: Cost, baselines: dict[str, Cost], **extra: Any) -> None:
        row = {
            "name": name,
            "wall_s": round(cost.wall_s, 5),
            "cpu_s": round(cost.cpu_s, 5),
            "baselines": {
                what: {
                    "wall_s": round(floor.wall_s, 5),
                    "cpu_s": round(floor.cpu_s, 5),
                    "wall_ratio": round(cost.wall_s / floor.wall_s, 3),
                    "cpu_ratio": round(cost.cpu_s / floor.cpu_s, 3) if floor.cpu_s > 0.001 else None,
                }
                for what, floor in baselines.items()
            },
            **extra,
        }
        self.rows.append(row)
        print(f"{name}: {cost.wall_s:.4f} s, {cost.cpu_s:.4f} s of CPU " + json.dumps(extra))
        for what, baseline in row["baselines"].items():
            ratio = baseline["cpu_ratio"]
            cpu = "" if ratio is None else f", CPU × {ratio}"
            print(f"    × {baseline['wall_ratio']}{cpu}  {what} ({baseline['wall_s']} s)", flush=True)


def save(loader: SnapshotLoader, keys: SnapshotKeySet, disk: Path | COWStore) -> SaveResult:
    """Save one chunked file."""
    return loader.cache_snapshot(
        keys.write_key, chunked_files={"disk": disk}, vm_configuration=hosts.CONFIGURATION
    )


def measure_local(report: Report, scratch: Path, image: Path) -> None:
    size = image.stat().st_size
    data = image.stat().st_blocks * 512
    copy = floors.copy_file(image, scratch / "floor")
    hashing = floors.hash_blake3(data)
    written = floors.write_file(scratch / "floor", data)
    # Some virtual machines hand memory back to their host, and pay for the first touch of every page they
    # get again. So what writes much is done three times, and the median counts, as in the baselines.
    costs = []
    for _ in range(3):
        shutil.rmtree(scratch / "local", ignore_errors=True)
        with hosts.host(scratch / "local") as loader:
            keys = hosts.key_set(loader)
            took, result = timed(partial(save, loader, keys, image))
            costs.append(took)
    took = floors.median(costs)
    with hosts.host(scratch / "local") as loader:
        report.add(
            "first save, local",
            took,
            {
                "writing the data as files, and BLAKE3": Cost(
                    written.wall_s + hashing.wall_s, written.cpu_s + hashing.cpu_s
                ),
                "copy of the file": copy,
                "BLAKE3, one thread": hashing,
                "memcpy": floors.memcpy(data),
            },
            stored_mib=result.stored_bytes // MIB,
        )
        first = took
        snapshot = loader.get_snapshot(keys)
        with loader.unpack_snapshot(snapshot, scratch / "unpacked") as unpacked:
            disk = unpacked.chunked_files["disk"]
            runs = images.touched_runs(size, 0.02)
            took, _ = timed(lambda: [disk.write_at(offset, os.urandom(length)) for offset, length in runs])
            touched = len(disk.dirty_chunks) * CHUNK
            floor = floors.hash_blake3(touched)
            took, result = timed(lambda: save(loader, keys, disk))
            report.add(
                "incremental save, local",
                took,
                {"BLAKE3 of the touched chunks, one thread": floor, "first save": first},
                touched_chunks=touched // CHUNK,
                hashed_chunks=result.files[0].hashed_chunks,
            )
        snapshot = loader.get_snapshot(keys)
        costs = []
        for _ in range(3):
            shutil.rmtree(scratch / "restored", ignore_errors=True)
            costs.append(timed(lambda: loader.restore_snapshot(snapshot, scratch / "restored"))[0])
        took = floors.median(costs)
        report.add(
            "full restore, warm cache", took, {"copy of the file": copy, "memcpy": floors.memcpy(data)}
        )
        shutil.rmtree(scratch / "restored")

    restored = took
    # A new process would start like this: nothing in memory, the files in the page cache.
    with hosts.host(scratch / "local") as loader:

        def first_read() -> bytes:
            snapshot = loader.get_snapshot(keys)
            with loader.unpack_snapshot(snapshot, scratch / "lazy") as unpacked:
                return unpacked.chunked_files["disk"].read_at(size // 2, 4096)

        took, _ = timed(first_read)
        tree = encode_tree(snapshot.tables["disk"])
        parse, _ = timed(lambda: decode_tree(tree, snapshot.manifest.digest_function))
        full = floors.cost(lambda: image.open("rb").read(4096))
        report.add(
            "lazy open + first 4 KiB, warm",
            took,
            {
                "parsing the tree": parse,
                "open + read of a plain file": full,
                "full restore": restored,
            },
        )


def raw_upload(url: str, blobs: list[tuple[reapi.Digest, bytes]], digest_function: int) -> Cost:
    """The same bytes through BatchUpdateBlobs and nothing else: 8 threads, batches of 1 MiB."""
    method = methods(CAS)["BatchUpdateBlobs"]
    with grpc.insecure_channel(url.removeprefix("grpc://")) as channel, ThreadPoolExecutor(8) as pool:
        call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)

        def send(batch: list[tuple[reapi.Digest, bytes]]) -> None:
            request = reapi.BatchUpdateBlobsRequest(digest_function=digest_function)
            for digest, data in batch:
                request.requests.add(digest=digest, data=data)
            response = call(request, timeout=60)
            assert all(item.status.code == 0 for item in response.responses)

        per_batch = BATCH // CHUNK
        batches = [blobs[i : i + per_batch] for i in range(0, len(blobs), per_batch)]
        return timed(lambda: list(pool.map(send, batches)))[0]


def raw_download(url: str, digests: list[reapi.Digest], digest_function: int) -> Cost:
    """The same bytes through BatchReadBlobs and nothing else."""
    method = methods(CAS)["BatchReadBlobs"]
    with grpc.insecure_channel(url.removeprefix("grpc://")) as channel, ThreadPoolExecutor(8) as pool:
        call = channel.unary_unary(method.path, method.request.SerializeToString, method.response.FromString)

        def receive(batch: list[reapi.Digest]) -> None:
            request = reapi.BatchReadBlobsRequest(digests=batch, digest_function=digest_function)
            response = call(request, timeout=60)
            assert all(item.status.code == 0 for item in response.responses)

        per_batch = BATCH // CHUNK
        batches = [digests[i : i + per_batch] for i in range(0, len(digests), per_batch)]
        return timed(lambda: list(pool.map(receive, batches)))[0]


def measure_remote(report: Report, scratch: Path, url: str, server: str, size: int) -> None:
    image, other = scratch / "remote.img", scratch / "other.img"
    images.memory_like(image, size, seed=11)
    images.memory_like(other, size, seed=12)
    folders = [scratch / f"{server}-{name}" for name in "abc"]
    with hosts.host(folders[0], url) as loader:
        keys = hosts.key_set(loader)
        took, result = timed(lambda: save(loader, keys, image))
        snapshot = loader.get_snapshot(keys)
        table = snapshot.tables["disk"]
        function = int(table.function)
        # Another image of the same kind, so that the server has to take every byte in the raw run too.
        with other.open("rb") as file:
            blobs = []
            for index in range(size // CHUNK):
                data = os.pread(file.fileno(), CHUNK, index * CHUNK)
                if any(data[:4096]):
                    digest = snaploader.Digest.of(data, table.function)
                    blobs.append((reapi.Digest(hash=digest.hash, size_bytes=len(data)), data))
        blobs = list({digest.hash: (digest, data) for digest, data in blobs}.values())
        raw = raw_upload(url, blobs, function)
        raw = raw.scaled(result.uploaded_bytes / max(1, sum(len(data) for _, data in blobs)))
        report.add(
            f"remote save, {server}",
            took,
            {"raw gRPC upload of as many bytes": raw},
            uploaded_mib=result.uploaded_bytes // MIB,
            digest_function=table.function.name,
        )
    with hosts.host(folders[1], url) as loader:
        took, snapshot = timed(lambda: loader.get_snapshot(keys))
        restore, result = timed(lambda: loader.restore_snapshot(snapshot, scratch / "remote-full"))
        unique = list(dict.fromkeys(snapshot.tables["disk"].digests()))
        raw = raw_download(
            url, [reapi.Digest(hash=d.hash, size_bytes=d.size_bytes) for d in unique], function
        )
        written = floors.write_file(scratch / "floor", result.fetched_bytes)
        report.add(
            f"remote load, {server}",
            last := Cost(took.wall_s + restore.wall_s, took.cpu_s + restore.cpu_s),
            {
                "raw gRPC download of the same bytes": raw,
                "the same, and writing them twice (cache, output)": Cost(
                    raw.wall_s + 2 * written.wall_s, raw.cpu_s + 2 * written.cpu_s
                ),
            },
            fetched_mib=result.fetched_bytes // MIB,
        )
        shutil.rmtree(scratch / "remote-full")
    with hosts.host(folders[2], url) as loader:

        def first_read() -> bytes:
            snapshot = loader.get_snapshot(keys)
            with loader.unpack_snapshot(snapshot, scratch / "remote-lazy") as unpacked:
                return unpacked.chunked_files["disk"].read_at(size // 2, 4096)

        took, _ = timed(first_read)
        report.add(f"remote lazy first 4 KiB, {server}", took, {"full remote load": last})
    for path in (*folders, image, other):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_casd() -> str | None:
    """The binary that the interop tests fetched, if they ran."""
    cache = os.environ.get("SNAPLOADER_TEST_CACHE", "~/.cache/snaploader-tests")
    found = sorted(Path(cache).expanduser().glob("buildbox-casd-*/buildbox-casd"))
    return str(found[-1]) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--remote-size-mib", type=int, default=512)
    parser.add_argument(
        "--casd", default=find_casd(), help="a buildbox-casd binary to measure against as well"
    )
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/loader.json"))
    arguments = parser.parse_args()
    tune_malloc()
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        scratch = Path(folder)
        image = scratch / "disk.img"
        images.memory_like(image, arguments.size_mib * MIB)
        measure_local(report, scratch, image)
        image.unlink()
        shutil.rmtree(scratch / "local")
        remote_size = arguments.remote_size_mib * MIB
        with hosts.embedded() as url:
            measure_remote(report, scratch, url, "embedded", remote_size)
        with hosts.casd(arguments.casd, scratch / "casd") as url:
            if url is not None:
                measure_remote(report, scratch, url, "casd", remote_size)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    machine = {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "snaploader": snaploader.__version__,
    }
    arguments.output.write_text(json.dumps({"machine": machine, "figures": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
