"""Chooses how a Hyper-V host is asked: through PowerShell remoting, or as the machine that this runs on."""

from __future__ import annotations

from replica.hyperv.session import Session


def connect(host: str | None) -> Session:
    """Return a session with the host of that URL, None for this machine. Raises SessionError."""
    if host is None:
        from replica.hyperv.local import LocalSession  # noqa: PLC0415 - only what is used is imported

        return LocalSession()
    from replica.hyperv.remote import RemoteSession  # noqa: PLC0415 - an optional dependency

    return RemoteSession(host)
