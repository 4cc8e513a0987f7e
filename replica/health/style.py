"""The look of the report: one style sheet, and the policy that lets a browser use it and nothing else."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Final

SHEET: Final = files(__package__).joinpath("report.css").read_text(encoding="utf-8")

_HASH: Final = base64.b64encode(hashlib.sha256(SHEET.encode()).digest()).decode()

# Nothing may be fetched, sent or run: but for the one style sheet, known by its hash, all is forbidden.
POLICY: Final = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'"
