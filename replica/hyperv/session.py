"""Asks a Hyper-V host: runs a script of ours there, and reads the one JSON document that it answers with.

Windows PowerShell 5.1 shapes JSON in ways of its own: a byte order mark, lists of one element that are no lists,
lists wrapped as ``{"value": […], "Count": n}``. All are read as what was meant. Nothing is concluded from the words of
an error, which are in the language of the host: scripts tell the kind of a failure, and numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from replica.errors import SourceError
from replica.hyperv.scripts import Script

MOST_ANSWER_CHARACTERS: Final = 64 << 20
MOST_MESSAGE_CHARACTERS: Final = 1000
_WRAPPED: Final = {"value", "Count"}


class Session(Protocol):
    """A PowerShell on a host, as long as it is open. For any number of threads."""

    def run(self, script: str, parameters: Mapping[str, str], *, timeout_seconds: float) -> str:
        """Run a script with parameters by name, and return what it prints. Raises SessionError."""

    def close(self) -> None:
        """End it. Safe to repeat."""


class HypervError(SourceError):
    """A Hyper-V host refused, or did something unforeseen. ``code`` is Windows's number for it, 0 where none is."""

    def __init__(
        self, message: str, *, kind: str = "Failed", code: int = 0, path: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message, path=path, hint=hint)
        self.kind = kind
        self.code = code


class SessionError(HypervError):
    """The host could not be reached, or did not answer: whether it did what was asked is not known."""

    retryable = True


class HypervDeniedError(HypervError):
    """The account may not do that."""


class HypervMissingError(HypervError):
    """There is no such VM, checkpoint, reference point or file."""


class HypervTimeoutError(HypervError):
    """The host had not finished in time, and may still be at it."""

    retryable = True


_KINDS: Final = {"Denied": HypervDeniedError, "NotFound": HypervMissingError, "Timeout": HypervTimeoutError}
_HINTS: Final = {
    "Denied": "the account must be one of the host's Hyper-V Administrators, or an administrator",
    "Timeout": "look at the VM's checkpoints on the host; the next cycle goes on from there",
}


def ask(session: Session, script: Script, *, timeout_seconds: float = 120, **parameters: str | int) -> Answer:
    """Run a script and return its answer. Raises HypervError and its kinds.

    ``timeout_seconds`` is also the script's own, where it takes one.
    """
    given = {name: str(value) for name, value in parameters.items()}  # numbers as text: no type is then too small
    if "TimeoutSeconds" in script.parameters:
        given["TimeoutSeconds"] = str(int(timeout_seconds))
    if set(given) != set(script.parameters):
        raise TypeError(f"{script.name} takes {script.parameters}, not {tuple(given)}")
    printed = session.run(script.text, given, timeout_seconds=timeout_seconds + 60)
    answer = decode(printed, script.name)
    fault = answer.optional("fault")
    if fault is not None:
        kind, code = fault.text("kind"), fault.integer("code")
        words = " ".join(fault.text("message").split())[:MOST_MESSAGE_CHARACTERS]
        shown = f" ({code & 0xFFFFFFFF:#x})" if code else ""
        raise _KINDS.get(kind, HypervError)(
            f"Hyper-V refuses to {script.name}{shown}: {words}", kind=kind, code=code, hint=_HINTS.get(kind)
        )
    return answer


def decode(printed: str, what: str) -> Answer:
    """Read what a script printed. Raises HypervError for anything but an answer of ours."""
    if len(printed) > MOST_ANSWER_CHARACTERS:
        raise HypervError(f"the host's answer to {what!r} is too long", kind="Answer")
    try:
        values = json.loads(printed.replace("\ufeff", "").strip())
    except (ValueError, RecursionError) as error:
        shown = " ".join(printed.split())[:200]
        raise HypervError(f"the host's answer to {what!r} is no JSON: {shown!r}", kind="Answer") from error
    values = _unwrapped(values)
    if not isinstance(values, dict) or values.get("godwit") != 1:
        raise HypervError(f"the host's answer to {what!r} is not one of Godwit's scripts", kind="Answer")
    return Answer(values, what)


def _unwrapped(value: Any) -> Any:
    """Undo the wrapping of lists, and of strings that PowerShell had hung properties on."""
    if isinstance(value, dict) and "value" in value and (set(value) == _WRAPPED or isinstance(value["value"], str)):
        return value["value"]
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "godwit" in value[0]:
        return value[0]
    return value


@dataclass(frozen=True, slots=True)
class Answer:
    """An object that a script answered with, its fields read by type. Wrong ones raise HypervError."""

    values: Mapping[str, Any]
    what: str

    def _value(self, name: str) -> Any:
        return _unwrapped(self.values.get(name))

    def _wrong(self, name: str, wanted: str) -> HypervError:
        found = f"{self.values.get(name)!r:.80}"
        return HypervError(f"the host's answer to {self.what!r} has {found} as {name}, not {wanted}", kind="Answer")

    def text(self, name: str) -> str:
        """Return a text; null is an empty one."""
        value = self._value(name)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._wrong(name, "a text")
        return value

    def integer(self, name: str) -> int:
        """Return a whole number."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, "a whole number")
        return value

    def flag(self, name: str) -> bool:
        """Return a truth value; null is false."""
        value = self._value(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return bool(value)

    def optional(self, name: str) -> Answer | None:
        """Return an object, or None."""
        value = self._value(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return None if value is None else Answer(value, self.what)

    def _list(self, name: str) -> list[Any]:
        value = self._value(name)
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]

    def objects(self, name: str) -> tuple[Answer, ...]:
        """Return a list of objects; one that stands alone is a list of one, null an empty one."""
        found = self._list(name)
        if not all(isinstance(one, dict) for one in found):
            raise self._wrong(name, "a list of objects")
        return tuple(Answer(one, self.what) for one in found)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts, as ``objects`` does."""
        found = [_unwrapped(one) for one in self._list(name)]
        if not all(isinstance(one, str) for one in found):
            raise self._wrong(name, "a list of texts")
        return tuple(found)
