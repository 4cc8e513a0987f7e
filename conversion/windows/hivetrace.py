"""Where the SYSTEM hive lies and what its logs hold: by that the way back tells whether Windows wrote to it meanwhile.

Windows keeps changes in the logs for up to an hour before it writes the hive, and a file may move to other clusters
while its old ones still hold what was written there. In both cases the bytes of the hive stand as they were written,
and putting the old ones back would be wrong.
"""

from __future__ import annotations

import hashlib
from typing import Any

from conversion.windows.guest import SYSTEM_HIVE
from conversion.windows.hivefile import read_logs
from conversion.windows.volume import Volume


def trace_of(windows: Volume) -> dict[str, Any]:
    """Return the JSON form of it, equal as long as hive and logs are where and what they were. Raises DamagedError."""
    if windows.filesystem is None:
        return {}
    logs = [hashlib.sha256(log).hexdigest() for log in read_logs(windows.filesystem, SYSTEM_HIVE)]
    return {"extents": [list(one) for one in windows.filesystem.extents(SYSTEM_HIVE) or ()], "logs": logs}
