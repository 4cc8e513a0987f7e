"""docs/restore_point.py restores what Godwit stored, with nothing of Godwit."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from replica import blockmap
from replica.keys import part_of
from replica.stores.file import FileStore
from tests.support.engine import BLOCK, Lab, make_host, make_lab, random_blocks

SCRIPT = Path(__file__).parents[2] / "docs" / "restore_point.py"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Points of two disks over merged maps: raw and compressed frames, zeros, blocks that became zeros, an odd size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockmap, "MERGE_MAPS", 3)
        folder = tmp_path_factory.mktemp("standalone")
        store = FileStore(folder / "store", create=True)
        odd = random_blocks(1, 9) + bytes(4 * BLOCK) + random_blocks(2, 6) + b"the end." * 64
        made = make_lab(folder, [odd, bytes(30 * BLOCK)], store=store, host=make_host(), name="größe 1/2")
        made.replicate()
        for number in range(1, 9):
            made.patch(number * BLOCK, random_blocks(10 + number, 1))
            made.patch((20 + number) * BLOCK, random_blocks(20 + number, 1), 1)
            if number == 5:
                made.patch(3 * BLOCK, bytes(2 * BLOCK))
                made.patch(21 * BLOCK, bytes(BLOCK), 1)
                made.patch(19 * BLOCK - 12, b"new tail of it")
            made.replicate()
        parts = [part_of(info.key) for info in store.list(made.found.keys.prefix + "maps/")]
        assert any(part is not None and part.ordinal > 0 for part in parts), "no map was merged"
        return made


def run(lab: Lab, *arguments: str, prelude: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(lab.folder / "store"), *arguments]
    if prelude:
        code = (
            f"{prelude}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
        )
        command = [sys.executable, "-c", code, *command[1:]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, timeout=120, check=False)


def test_it_imports_nothing_but_the_standard_library_zstandard_and_perhaps_xxhash() -> None:
    tree = ast.parse(SCRIPT.read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported - set(sys.stdlib_module_names) == {"zstandard", "xxhash"}
    assert len(SCRIPT.read_text().splitlines()) <= 160


@pytest.mark.parametrize("point", [1, 3, 6, 9])
def test_every_disk_of_a_point_is_restored_byte_for_byte(lab: Lab, tmp_path: Path, point: int) -> None:
    for disk, held in enumerate(lab.published[point]):
        target = tmp_path / f"{disk}.img"
        done = run(lab, lab.found.vm.vm_id if disk else "größe 1/2", str(point), str(disk), str(target))
        assert (done.returncode, done.stderr) == (0, "")
        assert target.read_bytes() == held


def test_it_works_without_xxhash_and_says_so(lab: Lab, tmp_path: Path) -> None:
    target = tmp_path / "0.img"
    prelude = "import sys; sys.modules['xxhash'] = None"
    done = run(lab, lab.found.vm.vm_id, "9", "0", str(target), prelude=prelude)
    assert done.returncode == 0, done.stderr
    assert "not checked" in done.stdout
    assert target.read_bytes() == lab.published[9][0]


def test_points_are_listed(lab: Lab) -> None:
    for arguments in ([], [lab.found.vm.vm_id]):
        done = run(lab, *arguments)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lab.found.vm.vm_id in lines[0]
        assert [line.split()[:2] for line in lines[1:]] == [["point", str(n)] for n in range(1, 10)]
        assert "disk0" in lines[1]
        assert "disk 1" in lines[1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no such"], "0 VMs"),
        (["größe 1/2", "99", "0", "{}/x"], "missing"),
        (["größe 1/2", "1", "7", "{}/x"], "no disk 7"),
        (["größe 1/2", "one", "0", "{}/x"], "numbers"),
        (["größe 1/2", "1"], "how to call it"),
    ],
)
def test_what_does_not_exist_is_said(lab: Lab, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(lab, *(argument.format(tmp_path) for argument in arguments))
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(lab: Lab, tmp_path: Path) -> None:
    for folder, at in (("segments", 100), ("segments", -1), ("maps", 100), ("manifests", 300)):
        files = [path for path in (lab.folder / "store" / lab.found.keys.prefix / folder).rglob("*") if path.is_file()]
        path = next(path for path in sorted(files) if f"{1:020}" in str(path))
        good = path.read_bytes()
        path.write_bytes(good[:at] + bytes([good[at] ^ 0xFF]) + (good[at + 1 :] if at >= 0 else b""))
        try:
            done = run(lab, lab.found.vm.vm_id, "1", "0", str(tmp_path / f"{folder}{at}"))
            assert done.returncode == 1, (folder, at)
            assert f"{1:020}" in done.stderr
            path.write_bytes(b"")
            assert run(lab, lab.found.vm.vm_id, "1", "0", str(tmp_path / f"cut{folder}{at}")).returncode == 1
        finally:
            path.write_bytes(good)
