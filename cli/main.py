"""The entry point: answers --version and a command's help without importing what only other commands need."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    raise SystemExit("godwit: no command exists yet")
