"""Metrics: assessments as Prometheus text. One sample for each VM and metric; the only label is the VM's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from replica.health.assessment import Assessment, Readiness
from replica.health.rules import Severity

# Name, help, and what it is of an assessment; None leaves the sample out.
METRICS: Final[tuple[tuple[str, str, Callable[[Assessment], float | None]], ...]] = (
    ("godwit_vm_health", "Health: 0 normal, 1 warning, 2 critical.", lambda one: one.health.rank),
    (
        "godwit_vm_readiness",
        "Readiness for recovery: 0 ready, 1 unproven, 2 not ready.",
        lambda one: list(Readiness).index(one.readiness),
    ),
    ("godwit_vm_reasons", "Reasons why the VM is not healthy.", lambda one: len(one.reasons)),
    ("godwit_vm_readable", "1 if the VM's records could be read.", lambda one: float(one.seen.unread is None)),
    ("godwit_vm_interval_seconds", "Interval at which points are wanted.", lambda one: one.seen.interval_seconds),
    ("godwit_vm_rpo_seconds", "Age of the newest restorable recovery point.", lambda one: one.rpo_seconds),
    (
        "godwit_vm_newest_point_timestamp_seconds",
        "Instant that the newest restorable recovery point holds.",
        lambda one: one.seen.newest_restorable.created_at.timestamp() if one.seen.newest_restorable else None,
    ),
    ("godwit_vm_points", "Recovery points that are listed.", lambda one: one.seen.listed),
    ("godwit_vm_damaged_points", "Recovery points known not to restore.", lambda one: len(one.seen.damaged)),
    ("godwit_vm_window_cycles", "Points made in the window of health.", lambda one: one.statistics.points),
    ("godwit_vm_window_missed_cycles", "Cycles missed in the window of health.", lambda one: one.statistics.misses),
    (
        "godwit_vm_latency_average_seconds",
        "Average time from a point's instant until it could be restored, in the window.",
        lambda one: one.statistics.average_latency_seconds,
    ),
    (
        "godwit_vm_stored_average_bytes",
        "Average bytes stored by a cycle of the window.",
        lambda one: one.statistics.average_stored_bytes,
    ),
    (
        "godwit_vm_changed_bytes",
        "Bytes that changed for the newest point.",
        lambda one: one.seen.newest.changed_bytes if one.seen.newest else None,
    ),
    (
        "godwit_vm_cycle_seconds",
        "How long the newest cycle took.",
        lambda one: one.seen.newest.seconds if one.seen.newest else None,
    ),
    (
        "godwit_vm_disk_bytes",
        "Virtual size of the VM's disks.",
        lambda one: one.seen.newest.size_bytes if one.seen.newest else None,
    ),
    (
        "godwit_vm_data_bytes",
        "Data on the VM's disks.",
        lambda one: one.seen.newest.data_bytes if one.seen.newest else None,
    ),
    (
        "godwit_vm_chain_files",
        "Files in the longest chain of the VM's disks.",
        lambda one: one.seen.newest.chain_files if one.seen.newest else None,
    ),
    (
        "godwit_vm_resynchronisation_forecast_seconds",
        "How long comparing everything would take.",
        lambda one: one.resynchronisation_seconds,
    ),
    (
        "godwit_vm_last_drill_timestamp_seconds",
        "When the last drill ended; no sample where there was none.",
        lambda one: one.seen.last_drill.at.timestamp() if one.seen.last_drill else None,
    ),
    (
        "godwit_vm_last_drill_passed",
        "1 if the last drill passed, its cleanup included; no sample where there was none.",
        lambda one: float(one.seen.last_drill.result == "passed") if one.seen.last_drill else None,
    ),
    (
        "godwit_vm_last_verify_timestamp_seconds",
        "When points were verified last; no sample where they never were.",
        lambda one: one.seen.last_verify.at.timestamp() if one.seen.last_verify else None,
    ),
)
FLEET: Final = (
    ("godwit_fleet_vms", "VMs by health; the label has one of three values."),
    ("godwit_report_timestamp_seconds", "When this report was made."),
)


def metrics(assessments: Iterable[Assessment], now_seconds: float) -> str:
    """Return the assessments as Prometheus text, as of ``now_seconds`` since 1970. Every label's value is escaped."""
    gauges = [(GaugeMetricFamily(name, text, labels=["vm"]), value) for name, text, value in METRICS]
    fleet = GaugeMetricFamily(*FLEET[0], labels=["health"])
    made = GaugeMetricFamily(*FLEET[1], value=now_seconds)
    count = dict.fromkeys(Severity, 0)
    for one in assessments:
        count[one.health] += 1
        # What UTF-8 cannot say is written escaped, or the whole text could not be written.
        label = [one.seen.name.encode("utf-8", "backslashreplace").decode()]
        for gauge, value in gauges:
            found = value(one)
            if found is not None:
                gauge.add_metric(label, found)
    for severity, number in count.items():
        fleet.add_metric([severity.value], number)
    registry = CollectorRegistry()
    registry.register(_Families([*(gauge for gauge, _ in gauges), fleet, made]))
    return generate_latest(registry).decode()


class _Families(Collector):
    """Metrics that are made already: thousands of labels are dear one by one."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families
