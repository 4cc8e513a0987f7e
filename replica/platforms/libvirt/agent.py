"""The guest agent of a domain: libvirt owns its channel, and passes on what it is asked."""

from __future__ import annotations

import json
import math
from typing import Any, Final, Self

from replica.libvirt.virsh import Virsh, VirshError, VirshRefusedError
from replica.monitor import MonitorError, MonitorGoneError

# A question is an argument of a program, for which systems have 128 KiB; base64 takes a third more.
PIECE_BYTES: Final = 64 << 10
POLL_SECONDS: Final = 0.5  # each question is a process
GRACE_SECONDS: Final = 10.0  # for libvirt itself, beside what the agent may take
_GONE: Final = ("not connected", "not responding", "not available", "is not running", "not configured")


class DomainAgent:
    """The agent of the domain of that UUID."""

    def __init__(self, virsh: Virsh, uuid: str, *, timeout_seconds: float) -> None:
        self._virsh = virsh
        self._uuid = uuid
        self._seconds = max(1, math.ceil(timeout_seconds))

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command. ``_`` in argument names stands for ``-``. Raises MonitorError, MonitorGoneError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        question = json.dumps({"execute": command, "arguments": named} if named else {"execute": command})
        try:
            text = self._virsh.ask(
                "qemu-agent-command",
                *("--domain", self._uuid, "--timeout", str(self._seconds), "--cmd", question),
                timeout_seconds=self._seconds + GRACE_SECONDS,
            )
        except VirshRefusedError as error:
            if any(word in error.message for word in _GONE):
                raise MonitorGoneError(error.message, path=self._uuid) from error
            raise MonitorError(f"the guest agent refuses {command}: {error.message}", path=self._uuid) from error
        except VirshError as error:
            raise MonitorGoneError(error.message, path=self._uuid, hint=error.hint) from error
        try:
            answer = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise MonitorGoneError("the guest agent sends what is no JSON", path=self._uuid) from error
        if not isinstance(answer, dict) or "return" not in answer:
            raise MonitorError(f"the guest agent does not answer to {command}", path=self._uuid)
        return answer["return"]

    def send(self, command: str, **arguments: Any) -> None:
        """Send a command that may have no answer. Raises MonitorError where it is refused."""
        self.execute(command, **arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        """Do nothing: nothing is kept open."""
