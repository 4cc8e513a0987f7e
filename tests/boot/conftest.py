"""The guest that the boot tests start: built once for all of them, then one disk of its own for each."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import debian_guest, qemu


@pytest.fixture(scope="session")
def guest_raw() -> Path:
    """The raw disk of a Generation 2 Debian; shared, so never written to."""
    missing = debian_guest.missing_tools() + qemu.missing_programs()
    if missing:
        reason = f"not installed: {', '.join(missing)}; `make setup` installs what is needed"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return debian_guest.cached_guest()
