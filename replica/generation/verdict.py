"""Whether an OS disk can be converted, in the few words that are worth keeping beside each recovery point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from conversion.errors import ConversionError
from conversion.finding import Finding, Severity
from conversion.inspection import inspect
from replica.generation.image import as_device
from vhdx.disk import Disk

MOST_FINDINGS: Final = 20
LONGEST_TEXT: Final = 200


@dataclass(frozen=True, slots=True)
class Verdict:
    """``findings`` are the refusals first, then the warnings; notes are not kept. Texts are cut short."""

    convertible: bool
    system: str
    findings: tuple[Finding, ...]

    def document(self) -> dict[str, Any]:
        """Return the JSON form, some hundred bytes."""
        return {
            "convertible": self.convertible,
            "system": self.system,
            "findings": [
                {"rule": one.rule, "severity": one.severity.value, "subject": one.subject, "evidence": one.evidence}
                for one in self.findings
            ],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Verdict:
        """Read the JSON form; messages and remedies are not in it. Raises KeyError, ValueError, TypeError."""
        findings = tuple(
            Finding(str(one["rule"]), Severity(one["severity"]), str(one["subject"]), "", str(one["evidence"]), "")
            for one in document["findings"][:MOST_FINDINGS]
        )
        return cls(bool(document["convertible"]), str(document["system"]), findings)


def verdict_of(disk: Disk) -> Verdict | None:
    """Return the verdict on an open disk; None where no machine starts from it by UEFI: there is nothing to convert.

    Reads some MiB at most. Raises what the disk raises.
    """
    try:
        found = inspect(as_device(disk))
    except ConversionError as error:
        finding = Finding("inspection-failed", Severity.REFUSAL, error.subject or "disk", "", _short(error.message), "")
        return Verdict(False, "unknown", (finding,))
    if found.generation != 2 or found.esp is None:
        return None
    grave = [one for one in found.findings if one.severity is not Severity.NOTE]
    grave.sort(key=lambda one: one.severity is not Severity.REFUSAL)
    kept = tuple(
        Finding(one.rule, one.severity, _short(one.subject), one.message, _short(one.evidence), one.remedy)
        for one in grave[:MOST_FINDINGS]
    )
    return Verdict(found.is_convertible, _short(found.system_name), kept)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
