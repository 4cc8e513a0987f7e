"""os-release: what a distribution calls itself."""

from __future__ import annotations

import shlex

from conversion.linux.system import Distribution


def parse_os_release(text: str) -> Distribution:
    """Return what an os-release says; fields that it has not are empty."""
    found: dict[str, str] = {}
    for line in text.splitlines()[:1000]:
        key, separator, value = line.strip().partition("=")
        if separator and not key.startswith("#"):
            try:
                found[key] = _first(value)
            except ValueError:
                found[key] = value.strip("\"'")
    return Distribution(found.get("ID", ""), found.get("VERSION_ID", ""), found.get("PRETTY_NAME", ""))


def _first(value: str) -> str:
    parts = shlex.split(value)
    return parts[0] if parts else ""
