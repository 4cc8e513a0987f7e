"""The report on a fleet: requests and seconds, by digests and by looking at each VM; in memory and on an S3 server."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from replica import catalog, cycle, keys, protection, record
from replica.health import digest, report
from replica.health.digest import Digest
from replica.health.metrics import metrics
from replica.health.observation import AgentNote, Event, EventKind, Observation, PointSample
from replica.health.observing import CHARTS, Depth
from replica.health.page import page
from replica.host import Host, SystemClock, SystemRandomness
from replica.model import Consistency
from replica.stores.address import open_store
from replica.stores.memory import MemoryStore
from replica.stores.store import ObjectData, ObjectInfo, Store

T = TypeVar("T")

TENANT = "default"
DIRECT = 100  # VMs that are protected and replicated for real, to be looked at
POINTS = 12


class CountingStore:
    """A store that counts what is asked of it; a LIST counts for each thousand."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.asked: Counter[str] = Counter()
        self.received_bytes = 0

    @property
    def url(self) -> str:
        """The inner store's address."""
        return self.inner.url

    def get(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        """Count a GET."""
        return self._received(self.inner.get(key, start=start, length=length))

    def get_tagged(self, key: str) -> tuple[bytes, str]:
        """Count a GET."""
        data, tag = self.inner.get_tagged(key)
        return self._received(data), tag

    def head(self, key: str) -> ObjectInfo:
        """Count a HEAD."""
        self.asked["head"] += 1
        return self.inner.head(key)

    def list(self, prefix: str, *, start_after: str = "") -> Iterator[ObjectInfo]:
        """Count a LIST for each thousand objects."""
        found = list(self.inner.list(prefix, start_after=start_after))
        self.asked["list"] += max(1, -(-len(found) // 1000))
        return iter(found)

    def create(self, key: str, data: ObjectData) -> str:
        """Pass it on."""
        return self.inner.create(key, data)

    def replace(self, key: str, data: ObjectData, *, tag: str) -> str:
        """Pass it on."""
        return self.inner.replace(key, data, tag=tag)

    def delete(self, key: str) -> None:
        """Pass it on."""
        self.inner.delete(key)

    def close(self) -> None:
        """Pass it on."""
        self.inner.close()

    def _received(self, data: bytes) -> bytes:
        self.asked["get"] += 1
        self.received_bytes += len(data)
        return data


def run(folder: Path, *, sizes: tuple[int, ...] = (1000, 10_000), with_server: bool = True) -> dict[str, Any]:
    """Measure reports on fleets of these sizes, and on real VMs without digests."""
    rows = []
    for size in sizes:
        rows += _fleet(MemoryStore(f"fleet {size}"), folder, size, "in memory")
        if with_server:
            rows += _on_server(folder / f"server-{size}", size)
    return {"rows": rows, "direct": _direct(folder / "direct")}


def _on_server(folder: Path, size: int) -> list[dict[str, Any]]:
    import pytest  # noqa: PLC0415 - only this needs what the tests bring

    from tests.support import servers  # noqa: PLC0415

    folder.mkdir()
    os.environ.update(servers.aws_environment())
    try:
        with servers.seaweedfs(folder) as server:
            store = open_store(server.url(f"fleet-{size}"), create=True, workers=16)
            return _fleet(store, folder, size, "SeaweedFS on loopback")
    except pytest.skip.Exception as reason:
        print(f"not measured: {reason}")
        return []


def _fleet(store: Store, folder: Path, size: int, where: str) -> list[dict[str, Any]]:
    host = _host()
    written = _write(store, host, size)
    counting = CountingStore(store)
    brief, spent = _timed(lambda: report.report(counting, host, TENANT))
    row: dict[str, Any] = {
        "where": where,
        "vms": size,
        "requests": dict(counting.asked),
        "requests_for_100_vms": round(sum(counting.asked.values()) * 100 / size, 2),
        "received_mib": round(counting.received_bytes / 2**20, 1),
        "largest_digest_kib": round(written / 1024),
        "report": spent,
    }
    assert len(brief.assessments) == size
    assert not brief.direct
    charts, row["report_with_points"] = _timed(lambda: report.report(counting, host, TENANT, depth=CHARTS))
    text, row["page"] = _timed(lambda: page(charts.assessments, charts.made_at))
    row["page_mib"] = round(len(text.encode()) / 2**20, 1)
    (folder / f"fleet-{size}.html").write_text(text, encoding="utf-8")
    _, row["metrics"] = _timed(lambda: metrics(brief.assessments, 0.0))
    _, row["json"] = _timed(lambda: json.dumps([report.document(one) for one in brief.assessments], default=str))
    return [row]


def _direct(folder: Path) -> dict[str, Any]:
    """Look at VMs of a dozen points each that no agent wrote a digest of."""
    folder.mkdir()
    store, host = MemoryStore("direct"), _host()
    catalog.init_store(store, host)
    for number in range(DIRECT):
        path = folder / f"{number}.img"
        path.write_bytes(bytes(65536))
        found, _ = protection.protect(store, host, tenant=TENANT, name=f"vm {number:03}", disks=[path])
        for _ in range(POINTS):
            cycle.replicate(store, host, found)
    counting = CountingStore(store)
    _, spent = _timed(lambda: report.report(counting, host, TENANT, depth=Depth()))
    asked = sum(counting.asked.values())
    return {"vms": DIRECT, "requests_for_100_vms": asked * 100 / DIRECT, "report": spent}


def _timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Return what the work gives, and its seconds: of the clock, and of a processor."""
    begun, worked = time.perf_counter(), time.process_time()
    given = work()
    return given, {
        "seconds": round(time.perf_counter() - begun, 2),
        "processor_seconds": round(time.process_time() - worked, 2),
    }


def _host() -> Host:
    drawn = SystemRandomness()
    return Host(SystemClock(), drawn, drawn.new_id(), "bench", None)


def _write(store: Store, host: Host, size: int) -> int:
    """Write names and digests of VMs that were made up, and return the size of the largest digest."""
    catalog.init_store(store, host)
    drawn, now = random.Random(size), datetime.now(UTC)
    names = [f"app-{number:05}" for number in range(size)]
    parts = [names[at : at + digest.MOST_VMS] for at in range(0, size, digest.MOST_VMS)]
    largest = 0
    with ThreadPoolExecutor(16) as pool:
        for number, part in enumerate(parts):
            seen = tuple(_made_up(name, drawn, now) for name in part)
            list(pool.map(lambda one: store.create(keys.name(TENANT, one.name), _name(one)), seen))
            told = Digest(TENANT, 0, drawn.randbytes(16).hex(), f"host-{number}", now, seen)
            data = digest.encode(told, None)
            store.create(told.key, data)
            largest = max(largest, len(data))
    return largest


def _name(one: Observation) -> bytes:
    return record.encode("name", {"name": one.name, "vm_id": one.vm_id})


def _made_up(name: str, drawn: random.Random, now: datetime) -> Observation:
    """Return a VM with as many points as a digest holds: most are well, some are not."""
    age = timedelta(minutes=5) if drawn.random() > 0.05 else timedelta(hours=drawn.random() * 12)
    points = []
    for back in range(digest.MOST_SAMPLES - 1, -1, -1):
        moment = now - age * drawn.random() - timedelta(minutes=5) * back**1.6
        changed, seconds = drawn.randrange(1 << 27), 2 + 20 * drawn.random()
        points.append(
            PointSample(
                point=5000 - round(back**1.6),
                created_at=moment,
                published_at=moment + timedelta(seconds=seconds),
                consistency=Consistency.CRASH,
                size_bytes=40 << 30,
                data_bytes=drawn.randrange(40 << 30),
                read_bytes=changed,
                changed_bytes=changed,
                stored_bytes=changed // 3,
                seconds=seconds,
                found_by="bitmap",
                chain_files=1,
            )
        )
    drill = Event(EventKind.DRILL, now - timedelta(days=drawn.randrange(120)), "passed", "host-b", (4000,), 80.0, "")
    made = Observation(
        vm_id=drawn.randbytes(16).hex(),
        name=name,
        at=now,
        as_of=now,
        protected_since=now - timedelta(days=99),
        retention="all:2h,hourly:24",
        source_host="host",
        samples=tuple(points),
        listed=60,
        last_verify=Event(EventKind.VERIFY, now - timedelta(days=1), "partial"),
        drills=(drill,) if drawn.random() > 0.1 else (),
        convertibility="convertible",
    )
    return replace(made, agent=AgentNote("host", now, "waiting"))


def show(found: dict[str, Any]) -> None:
    """Print what was measured."""
    steps = ("report", "report_with_points", "page", "metrics", "json")
    print(f"{'seconds (of a processor)':28}{'VMs':>6}{'req/100':>9}{'MiB':>6}", end="")
    print("".join(f"{step.replace('_', ' '):>20}" for step in steps) + f"{'page MiB':>10}")
    for row in found["rows"]:
        print(f"{row['where']:28}{row['vms']:>6}{row['requests_for_100_vms']:>9}{row['received_mib']:>6}", end="")
        print("".join(f"{_spent(row[step]):>20}" for step in steps) + f"{row['page_mib']:>10}")
    direct = found["direct"]
    print(f"{'each looked at, in memory':28}{direct['vms']:>6}{direct['requests_for_100_vms']:>9}{'':>6}", end="")
    print(f"{_spent(direct['report']):>20}\n")


def _spent(one: dict[str, float]) -> str:
    return f"{one['seconds']} ({one['processor_seconds']})"
