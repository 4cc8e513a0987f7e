"""The rules of health, as data: what each looks at, from where on it speaks, how grave that is, and what to do.

docs/health.md holds the same table for people, and says where each threshold comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal, TypeAlias


class Severity(StrEnum):
    """How grave what a rule found is, and the health of a VM: that of its gravest reason."""

    NORMAL = "normal"
    WARNING = "warning"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0 for normal, 2 for critical."""
        return list(Severity).index(self)


class Aspect(StrEnum):
    """What a rule speaks of: whether replication goes well, or whether a recovery would."""

    HEALTH = "health"
    READINESS = "readiness"


Unit: TypeAlias = Literal["seconds", "percent", "count", "files", ""]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. It speaks where what it observes is more than ``threshold`` (``free-space``: less).

    ``intervals``: the threshold is so many of the VM's own intervals, where that is longer than ``threshold``.
    A rule without a threshold observes something that is so or is not.
    """

    rule_id: str
    aspect: Aspect
    severity: Severity
    observes: str
    remedy: str
    threshold: float | None = None
    unit: Unit = ""
    intervals: float = 0.0

    def threshold_for(self, interval_seconds: int) -> float | None:
        """Return the threshold for a VM with that interval."""
        return None if self.threshold is None else max(self.threshold, self.intervals * interval_seconds)


_H, _R = Aspect.HEALTH, Aspect.READINESS
_W, _C = Severity.WARNING, Severity.CRITICAL
_HOUR, _DAY = 3600.0, 86400.0

_ALL: Final = (
    # --- health: does replication go well
    Rule("unreadable", _H, _C, "whether the VM's records can be read", "run 'godwit verify' and look at what it names"),
    Rule(
        "no-point",
        _H,
        _W,
        "whether initial replication is complete",
        "run 'godwit replicate'; until it ends nothing can be restored",
    ),
    Rule(
        "nothing-restorable",
        _H,
        _C,
        "whether any recovery point restores",
        "run 'godwit repair' where the source is, then 'godwit verify'",
    ),
    Rule(
        "newest-damaged",
        _H,
        _C,
        "points newer than the newest that restores, all of them damaged",
        "run 'godwit repair' where the source is; until then an older point is what would be recovered",
        threshold=0,
        unit="count",
    ),
    Rule(
        "older-damaged",
        _H,
        _W,
        "damaged points older than the newest that restores",
        "run 'godwit verify' to see what they lost, and 'godwit repair' to put back what can be",
        threshold=0,
        unit="count",
    ),
    Rule(
        "rpo-critical",
        _H,
        _C,
        "age of the newest restorable point",
        "see whether the agent runs and reaches source and store: 'godwit replicate' tells the error",
        threshold=4 * _HOUR,
        unit="seconds",
        intervals=12,
    ),
    Rule(
        "rpo-late",
        _H,
        _W,
        "age of the newest restorable point",
        "see whether the agent runs; a longer interval or more bandwidth where cycles take too long",
        threshold=0.5 * _HOUR,
        unit="seconds",
        intervals=2,
    ),
    Rule(
        "cannot-send",
        _H,
        _C,
        "age of the newest point, where the last cycle ended without one",
        "run 'godwit replicate' where the source is: it names what is in the way",
        threshold=_HOUR,
        unit="seconds",
        intervals=4,
    ),
    Rule(
        "cycle-cut-off",
        _H,
        _W,
        "whether the last cycle ended without a point",
        "the next cycle takes up what was sent; where this lasts, 'godwit replicate' names the reason",
    ),
    Rule(
        "missed-cycles",
        _H,
        _W,
        "missed cycles of the window, of all that were due",
        "see whether the agent ran all the time; if cycles take longer than the interval, lengthen it",
        threshold=20,
        unit="percent",
    ),
    Rule(
        "latency",
        _H,
        _W,
        "average time of the window's cycles from their instant until they could be restored",
        "look at bandwidth to the store, at what the guest writes, and at other VMs replicated at the same time",
        threshold=300,
        unit="seconds",
        intervals=1,
    ),
    Rule(
        "resynchronising-often",
        _H,
        _W,
        "cycles of the window that compared everything because the record of changes was lost",
        "see the reason beside each point in 'godwit points --json': disks replaced, reverted, or hosts that crash",
        threshold=2,
        unit="count",
    ),
    Rule(
        "not-quiesced",
        _H,
        _W,
        "whether the guest was settled for the newest point, where that was wanted",
        "see whether the guest agent runs in the guest; the point is crash-consistent",
    ),
    Rule(
        "checkpoint-not-followed",
        _H,
        _W,
        "whether other disks stand on a file that the newest point was read from",
        "if the VM runs on one of them: 'godwit protect NAME --update --disk NEWEST', for every disk",
    ),
    Rule(
        "not-protected",
        _H,
        _W,
        "time since the VM failed over, while its recovery machine is not replicated",
        "settle with 'godwit commit' and then 'godwit reprotect', or go back with 'godwit cleanup'",
        threshold=0,
        unit="seconds",
    ),
    Rule(
        "clock-skew",
        _H,
        _W,
        "how far clocks differ, by the times of points and the store's",
        "set the clocks of the source's host and of this machine by NTP: RPO is only as true as they are",
        threshold=60,
        unit="seconds",
    ),
    Rule(
        "agent-silent",
        _H,
        _W,
        "time since the agent of the VM's host wrote down how it stands",
        "see whether 'godwit run' runs there; 'godwit health --fresh' asks the store itself",
        threshold=0.25 * _HOUR,
        unit="seconds",
    ),
    Rule(
        "agent-failing",
        _H,
        _W,
        "cycles in a row that failed at the agent, or that it stopped trying",
        "do what the error says; SIGHUP has the agent try again at once",
        threshold=2,
        unit="count",
    ),
    # --- readiness: would a recovery succeed
    Rule("key-missing", _R, _C, "whether the key that opens the VM is here", "give the key: 'godwit key check'"),
    Rule("drill-never", _R, _W, "whether a drill was ever made", "run 'godwit drill'"),
    Rule("drill-failed", _R, _C, "whether the last drill passed, cleanup included", "see the drill's evidence"),
    Rule(
        "drill-old",
        _R,
        _W,
        "age of the last drill that passed",
        "run 'godwit drill'",
        threshold=90 * _DAY,
        unit="seconds",
    ),
    Rule(
        "not-convertible",
        _R,
        _C,
        "whether the VM's OS disk converts, where its platform needs that",
        "'godwit status' of the VM names what is in the way, and what to do about it",
    ),
    Rule("verify-never", _R, _W, "whether the points were ever verified", "run 'godwit verify'"),
    Rule(
        "verify-old",
        _R,
        _W,
        "age of the last verification",
        "run 'godwit verify --sampled' daily",
        threshold=7 * _DAY,
        unit="seconds",
    ),
    Rule(
        "history-short",
        _R,
        _W,
        "by how much the oldest point is younger than the retention rule promises",
        "see who removed points, and whether points were made all the time",
        threshold=_DAY,
        unit="seconds",
    ),
    Rule(
        "chain-long",
        _R,
        _W,
        "files in the chain of a disk: checkpoints that were never merged",
        "delete the checkpoints in the hypervisor, which merges their files, "
        "or merge what Hyper-V no longer lists with 'godwit checkpoints merge'",
        threshold=8,
        unit="files",
    ),
    Rule(
        "free-space",
        _R,
        _W,
        "free space where the disks and this machine's state lie",
        "make room: a guest stops when its disk cannot grow",
        threshold=10,
        unit="percent",
    ),
    Rule(
        "resynchronisation-long",
        _R,
        _W,
        "forecast of a resynchronisation: what the disks hold, at the rate that was measured",
        "expect it after a loss of tracking; reading faster, or fewer VMs at a time, shortens it",
        threshold=8 * _HOUR,
        unit="seconds",
    ),
)

RULES: Final = {rule.rule_id: rule for rule in _ALL}
