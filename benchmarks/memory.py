"""Peak memory of a whole process that replicates and restores a large, sparse disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.image import MIB, make_vhdx

TIB = 1 << 40


def run(folder: Path, *, virtual_size: int = 64 * TIB, data_mib: int = 2048, seed: int = 5) -> list[dict[str, Any]]:
    """Replicate and restore such a disk by the command; return a row for each command with its peak memory."""
    image = folder / "large.vhdx"
    make_vhdx(image, virtual_size=virtual_size, data_mib=data_mib, seed=seed)
    store = str(folder / "large-store")
    environment = {**os.environ, "GODWIT_STORE": store, "GODWIT_STATE": str(folder / "large-state")}
    rows = []
    for name, arguments in (
        ("init", ["init"]),
        ("protect", ["protect", "large", "--disk", str(image)]),
        ("initial replication", ["replicate", "large"]),
        ("delta by hash", ["replicate", "large"]),
        ("restore to VHDX", ["restore", "large", "--to", str(folder / "large-restored.vhdx")]),
    ):
        code = (
            "import json,resource,subprocess,sys,time;s=time.perf_counter();"
            "r=subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL,stderr=subprocess.PIPE);"
            "u=resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(json.dumps([r.returncode,time.perf_counter()-s,u.ru_maxrss*1024,r.stderr.decode()[-500:]]))"
        )
        godwit = str(Path(sys.executable).parent / "godwit")
        done = subprocess.run(
            [sys.executable, "-c", code, godwit, *arguments, "--quiet"],
            env=environment,
            capture_output=True,
            check=True,
        )
        status, seconds, peak_bytes, complaint = json.loads(done.stdout)
        if status:
            raise RuntimeError(f"godwit {' '.join(arguments)} ended with {status}: {complaint}")
        rows.append({"name": name, "seconds": seconds, "peak_mib": peak_bytes / MIB})
    return rows
