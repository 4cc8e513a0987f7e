"""PowerShell remoting to a Hyper-V host: the one place that imports pypsrp.

Who the session is comes from the environment, GODWIT_HYPERV_USER and GODWIT_HYPERV_PASSWORD, and is the account that
this runs as (Kerberos, or Windows's own) where they are not set. GODWIT_HYPERV_CA is a file of certificate authorities
for HTTPS, beside those that the system trusts. Over HTTP the messages themselves are encrypted, or nothing is sent.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urlsplit

from replica.hyperv.session import MOST_MESSAGE_CHARACTERS, SessionError

USER: Final = "GODWIT_HYPERV_USER"
PASSWORD: Final = "GODWIT_HYPERV_PASSWORD"
CA: Final = "GODWIT_HYPERV_CA"
CONNECT_SECONDS: Final = 30
POLL_SECONDS: Final = 20
COMPLETED: Final = 4  # states of a pipeline: [MS-PSRP] 2.2.3.5
RUNNING: Final = 1


class RemoteSession:
    """A runspace on a host, opened with the first question."""

    def __init__(self, host: str) -> None:
        """``host`` is a URL, as ``parse_host`` returns it. Nothing is sent yet. Raises SessionError."""
        self._host = host
        self._lock = threading.Lock()
        self._pool: Any = None
        self._connection: Any = None
        try:
            self._wsman: Any = importlib.import_module("pypsrp.wsman")
            self._powershell: Any = importlib.import_module("pypsrp.powershell")
        except ImportError as error:
            raise SessionError(
                "a Hyper-V host is reached by pypsrp, which is not installed", hint="pip install 'godwit-dr[hyperv]'"
            ) from error

    def run(self, script: str, parameters: Mapping[str, str], *, timeout_seconds: float) -> str:
        """Run a script, as ``Session`` says. Raises SessionError."""
        with self._lock:
            try:
                return self._run(script, parameters, time.monotonic() + timeout_seconds)
            except SessionError:
                raise
            except Exception as error:  # pypsrp lets errors of requests, of its own and of spnego through, as they come
                self._drop()
                raise SessionError(
                    f"the host cannot be asked: {_scrubbed(error)}",
                    path=self._host,
                    hint="check that PowerShell remoting is on there, the port, the certificate and the account",
                ) from None  # its own cause may hold what was sent

    def _run(self, script: str, parameters: Mapping[str, str], deadline: float) -> str:
        pipeline = self._powershell.PowerShell(self._opened())
        pipeline.add_script(script)
        pipeline.add_parameters(dict(parameters))
        pipeline.begin_invoke()
        while pipeline.state == RUNNING:
            if time.monotonic() > deadline:
                self._drop()
                raise SessionError("the host did not answer in time", path=self._host)
            pipeline.poll_invoke(timeout=POLL_SECONDS)
        if pipeline.state != COMPLETED:
            words = "; ".join(str(one) for one in pipeline.streams.error) or "it gave no reason"
            raise SessionError(f"the script failed: {_scrubbed(words)}", path=self._host)
        return "\n".join(str(one) for one in pipeline.output)

    def _opened(self) -> Any:
        if self._pool is None:
            parts = urlsplit(self._host)
            secure = parts.scheme == "https"
            self._connection = self._wsman.WSMan(
                parts.hostname,
                port=parts.port,
                username=os.environ.get(USER) or None,
                password=os.environ.get(PASSWORD) or None,
                ssl=secure,
                auth="negotiate",
                cert_validation=os.environ.get(CA) or True,
                encryption="auto" if secure else "always",
                connection_timeout=CONNECT_SECONDS,
                operation_timeout=POLL_SECONDS,
                read_timeout=POLL_SECONDS + 10,
            )
            pool = self._powershell.RunspacePool(self._connection, no_profile=True)
            pool.open()
            self._pool = pool
        return self._pool

    def _drop(self) -> None:
        pool, connection, self._pool, self._connection = self._pool, self._connection, None, None
        for one in (pool, connection):
            with suppress(Exception):  # what cannot be ended there ends by itself, idle
                if one is not None:
                    one.close()

    def close(self) -> None:
        """End the runspace. Safe to repeat."""
        with self._lock:
            self._drop()


def _scrubbed(error: object) -> str:
    """Return an error's words without the password, should some library have put it there."""
    words, secret = str(error), os.environ.get(PASSWORD)
    if secret:
        words = words.replace(secret, "***")
    return " ".join(words.split())[:MOST_MESSAGE_CHARACTERS] or type(error).__name__
