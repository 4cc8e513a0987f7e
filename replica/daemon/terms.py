"""The agent's section of the configuration: what may be said there, and what it means."""

from __future__ import annotations

import glob
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, time, tzinfo
from typing import Any, Final
from zoneinfo import ZoneInfo

from replica.daemon.bandwidth import DAYS, LEAST_BYTES_PER_SECOND, Limits, Window
from replica.sampling import Budget

MOST_CONCURRENT: Final = 64
MOST_WINDOWS: Final = 100
LONGEST_SECONDS: Final = 366 * 86400

_SPAN: Final = re.compile(r"([0-9]{1,9})([smhdw])")
_SPAN_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE: Final = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*([KMGT]?)(?:iB|B)?", re.IGNORECASE)
_SHARE: Final = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s*%")
_TIME: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])")
_ADDRESS: Final = re.compile(r"(?:\[([0-9A-Fa-f:]+)\]|([0-9.]+|localhost)):([0-9]{1,5})")

_UNLIMITED: Final = Limits()
_A_FIFTIETH: Final = Budget(share=0.02)


@dataclass(frozen=True, slots=True)
class AgentTerms:
    """How the agent works. Periods are seconds; None is never."""

    vms: tuple[str, ...] = ()  # patterns of names; none: those whose disks can be read here
    concurrency: int = 2
    limits: Limits = _UNLIMITED
    refresh_seconds: int = 60  # how often VMs that are new, gone or changed are looked for
    grace_seconds: int = 30  # how long cycles may go on after the agent was told to stop
    patience_seconds: int = 120  # how long one call on the store is repeated
    prune_seconds: int | None = 6 * 3600
    gc_seconds: int | None = 12 * 3600
    retain: bool = True
    verify: Budget | None = _A_FIFTIETH  # a day
    drill_seconds: int | None = None
    metrics: tuple[str, int] | None = None  # address and port


def read(value: Any) -> tuple[AgentTerms, list[str]]:
    """Return the terms of the section ``agent``, and every mistake in it."""
    if not isinstance(value, Mapping):
        return AgentTerms(), ["agent: should be a table, [agent]"]
    mistakes: list[str] = []
    zone = _Zones(mistakes).zone("agent.time_zone", value.get("time_zone", "UTC"))
    found: dict[str, Any] = {}
    settings: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "vms": ("vms", _patterns),
        "concurrency": ("concurrency", _concurrency),
        "refresh": ("refresh_seconds", _span),
        "grace": ("grace_seconds", _span_or_nothing),
        "patience": ("patience_seconds", _span_or_nothing),
        "prune": ("prune_seconds", _period),
        "gc": ("gc_seconds", _period),
        "retain": ("retain", _truth),
        "verify": ("verify", _budget),
        "drill": ("drill_seconds", _period),
        "metrics": ("metrics", _loopback),
    }
    for name, (field, check) in settings.items():
        if name in value:
            try:
                found[field] = check(value[name])
            except ValueError as error:
                mistakes.append(f"agent.{name}: {error}")
    if "bandwidth" in value:
        found["limits"] = _limits(value["bandwidth"], zone, mistakes)
    known = (*settings, "bandwidth", "time_zone")
    mistakes += [f"agent.{name} is not a setting: there are {', '.join(known)}" for name in value if name not in known]
    return AgentTerms(**found), mistakes


def chosen_by_name(terms: AgentTerms, name: str | None) -> AgentTerms:
    """Return the terms for one VM, or for all where ``name`` is None, wherever their disks are; without an endpoint."""
    return replace(terms, vms=("*" if name is None else glob.escape(name),), metrics=None)


class _Zones:
    """Finds time zones, noting those that do not exist."""

    def __init__(self, mistakes: list[str]) -> None:
        self._mistakes = mistakes

    def zone(self, name: str, value: Any) -> tzinfo:
        if value == "UTC":
            return UTC
        try:
            if not isinstance(value, str) or not value:
                raise ValueError
            return ZoneInfo(value)
        except (ValueError, OSError, LookupError):  # ZoneInfoNotFoundError is a KeyError; a folder's name an OSError
            self._mistakes.append(f"{name}: {value!r:.60} is no time zone known here: write one such as Europe/Berlin")
            return UTC


def _limits(value: Any, zone: tzinfo, mistakes: list[str]) -> Limits:
    if isinstance(value, str):
        value = [{"limit": value}]
    if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value) or len(value) > MOST_WINDOWS:
        mistakes.append(f"agent.bandwidth: should be a rate such as '50MiB/s', or up to {MOST_WINDOWS} tables")
        return Limits()
    windows = []
    for number, one in enumerate(value, 1):
        name = f"agent.bandwidth {number}" if len(value) > 1 else "agent.bandwidth"
        its_zone = _Zones(mistakes).zone(f"{name} zone", one["zone"]) if "zone" in one else zone
        try:
            windows.append(_window(one, its_zone))
        except ValueError as error:
            mistakes.append(f"{name}: {error}")
    return Limits(tuple(windows))


def _window(value: Mapping[str, Any], zone: tzinfo) -> Window:
    unknown = sorted(set(value) - {"limit", "from", "to", "days", "zone"})
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a setting: there are limit, from, to, days, zone")
    if "limit" not in value:
        raise ValueError("lacks its limit")
    if ("from" in value) != ("to" in value):
        raise ValueError("'from' and 'to' come together")
    start = end = None
    if "from" in value:
        start, end = _time(value["from"]), _time(value["to"])
        if start == end:
            raise ValueError("'from' and 'to' are the same; leave both out for the whole day")
    return Window(_rate(value["limit"]), start, end, _days(value.get("days", list(DAYS))), zone)


def _rate(value: Any) -> int | None:
    if value == "none":
        return None
    text = value.removesuffix("/s") if isinstance(value, str) else ""
    if text == value or not text:
        raise ValueError("should be a rate such as '50MiB/s', or 'none'")
    rate = _size(text)
    if rate < LEAST_BYTES_PER_SECOND:
        raise ValueError(f"{value!r} is too little: 64KiB/s is the least")
    return rate


def _size(text: str) -> int:
    written = _SIZE.fullmatch(text.strip())
    if written is None:
        raise ValueError(f"{text!r:.60} is no size: write one such as 10GiB")
    unit = written[2].upper()
    return int(float(written[1]) * 1024 ** (" KMGT".index(unit) if unit else 0))


def _budget(value: Any) -> Budget | None:
    if value == "off":
        return None
    if not isinstance(value, str):
        raise ValueError("should be how much is read a day, such as '5%' or '10GiB', or 'off'")
    share = _SHARE.fullmatch(value.strip())
    if share is None:
        size_bytes = _size(value)
        if not size_bytes:
            raise ValueError("nothing can be read with a budget of 0; write 'off'")
        return Budget(size_bytes=size_bytes)
    if not 0 < float(share[1]) <= 100:
        raise ValueError("a share is more than 0% and at most 100%")
    return Budget(share=float(share[1]) / 100)


def _time(value: Any) -> time:
    if isinstance(value, time) and value.second == value.microsecond == 0:  # TOML has times of its own
        return value
    written = _TIME.fullmatch(value) if isinstance(value, str) else None
    if written is None:
        raise ValueError(f"{value!r:.40} is no time of day: write one such as 08:00, to the minute")
    return time(int(written[1]), int(written[2]))


def _days(value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not value or not all(one in DAYS for one in value):
        raise ValueError(f"days are a list of {', '.join(DAYS)}")
    return frozenset(DAYS.index(one) for one in value)


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise ValueError("should be a list of names, in which * and ? stand for others")
    return tuple(value)


def _concurrency(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_CONCURRENT:
        raise ValueError(f"should be a whole number from 1 to {MOST_CONCURRENT}")
    return value


def _span_or_nothing(value: Any) -> int:
    return 0 if value in ("0", "0s") else _span(value)


def _span(value: Any) -> int:
    written = _SPAN.fullmatch(value) if isinstance(value, str) else None
    seconds = int(written[1]) * _SPAN_SECONDS[written[2]] if written else 0
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError("should be a span of time such as '30s', '5m', '12h' or '7d'")
    return seconds


def _period(value: Any) -> int | None:
    return None if value == "off" else _span(value)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("should be true or false")
    return value


def _loopback(value: Any) -> tuple[str, int]:
    written = _ADDRESS.fullmatch(value) if isinstance(value, str) else None
    if written is None or not int(written[3]) < 65536:
        raise ValueError("should be an address and a port such as '127.0.0.1:9478'")
    host = written[1] or written[2]
    if host == "localhost":
        host = "127.0.0.1"
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ValueError(f"{host} is not this machine's own: VM names are not for everybody; write 127.0.0.1")
    return host, int(written[3])
