"""What an inspection found out, as an administrator acts on it: a rule, how grave, the evidence, the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

# Of what an inspection looks for and says of it: raised with every change, so that verdicts that are kept are renewed.
RULES_VERSION: Final = 1


class Severity(StrEnum):
    """How grave a finding is. Only ``REFUSAL`` keeps a disk from being converted."""

    NOTE = "note"
    WARNING = "warning"
    REFUSAL = "refusal"


@dataclass(frozen=True, slots=True)
class Finding:
    """``rule`` is a stable id such as ``bitlocker``; ``subject`` names the partition, volume or file."""

    rule: str
    severity: Severity
    subject: str
    message: str  # a sentence
    evidence: str  # what was read, and where
    remedy: str  # what to do; empty where nothing needs doing

    def document(self) -> dict[str, str]:
        """Return the JSON form."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "subject": self.subject,
            "message": self.message,
            "evidence": self.evidence,
            "remedy": self.remedy,
        }
