from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cli.main import run
from cli.output import Output
from tests.support.vhd_files import write_child
from vhdx.create import create_disk
from vhdx.formats import open_disk
from vhdx.vhd_create import create_dynamic

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT.parent / "shared" / "samples" / "vhdx"
MIB = 1 << 20
KIB = 1 << 10


def godwit(*arguments: object) -> tuple[int, str, str]:
    output = Output(stdout=io.StringIO(), stderr=io.StringIO())
    code = run([str(argument) for argument in arguments], output)
    assert isinstance(output.stdout, io.StringIO)
    assert isinstance(output.stderr, io.StringIO)
    assert "Traceback" not in output.stderr.getvalue()
    return code, output.stdout.getvalue(), output.stderr.getvalue()


def disk_json(*arguments: object) -> tuple[int, Any]:
    code, out, _ = godwit("disk", *arguments, "--json")
    return code, json.loads(out)


def sample(name: str, folder: Path) -> Path:
    packed = SAMPLES / f"{name}.gz"
    if not packed.exists():
        pytest.skip(f"the sample {name} is not at hand (looked in {SAMPLES})")
    path = folder / name
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    return path


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A VHDX of 8 MiB with a child and a grandchild, each holding something of its own."""
    for name, parent, offset in (("base.vhdx", None, 0), ("child.avhdx", "base", 3), ("top.avhdx", "child", 5)):
        path = tmp_path / name
        if parent is None:
            create_disk(path, size=8 * MIB, block_size=MIB)
        else:
            create_disk(path, parent=next(tmp_path.glob(f"{parent}.*")), block_size=MIB)
        with open_disk(path, writable=True) as disk:
            disk.write_at(offset * MIB, name.encode() * 100)
    return tmp_path / "top.avhdx"


# --- info


def test_info_of_a_chain(chain: Path) -> None:
    code, found = disk_json("info", chain)
    assert code == 0
    assert (found["format"], found["kind"], found["virtual_size"]) == ("vhdx", "differencing", 8 * MIB)
    assert [Path(link["path"]).name for link in found["chain"]] == ["top.avhdx", "child.avhdx", "base.vhdx"]
    assert found["parent"]["file"].endswith("child.avhdx") and found["parent"]["error"] is None
    assert found["allocated_size"] > found["stored_size"] > 0
    code, text, _ = godwit("disk", "info", chain)
    assert code == 0 and "8 MiB (8388608 bytes)" in text and "base.vhdx" in text


def test_info_without_the_parent_still_tells(tmp_path: Path) -> None:
    path = sample("differencing.avhdx", tmp_path)
    code, found = disk_json("info", path)
    assert code == 0
    assert found["virtual_size"] == 8 << 30
    assert found["stored_size"] == 3174400
    assert found["allocated_size"] is None
    assert "missing" in found["parent"]["error"]
    assert any("Generation 1_" in place["path"] for place in found["parent"]["paths"])


def test_info_with_a_changed_parent_still_tells(chain: Path, tmp_path: Path) -> None:
    with open_disk(tmp_path / "child.avhdx", writable=True) as disk:
        disk.write_at(0, b"changed")
    code, found = disk_json("info", chain)
    assert code == 0
    assert "changed" in found["parent"]["error"]


def test_info_of_a_log_that_wants_replay_does_not_write(tmp_path: Path) -> None:
    path = sample("vhdx-log-replay.vhdx", tmp_path)
    before = path.read_bytes()
    code, found = disk_json("info", path)
    assert code == 0 and found["log"]["state"] == "replay" and found["log"]["entries"] > 0
    assert godwit("disk", "check", path)[0] == 3
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["fixed.vhd", "dynamic.vhd"])
def test_info_of_vhd(tmp_path: Path, name: str) -> None:
    path = sample(name, tmp_path)
    code, found = disk_json("info", path)
    assert code == 0
    assert (found["format"], found["kind"], found["virtual_size"]) == ("vhd", name.partition(".")[0], 10 * MIB)
    assert found["created"].startswith("2020-03-24T") and found["created"].endswith("Z")
    assert found["geometry"] == {"cylinders": 301, "heads": 4, "sectors_per_track": 17}


# --- check


def test_check_tells_errors_warnings_and_soundness_apart_and_changes_nothing(chain: Path, tmp_path: Path) -> None:
    assert disk_json("check", chain)[0] == 0
    (tmp_path / "child.avhdx").rename(tmp_path / "gone")
    code, report = disk_json("check", chain)
    assert (code, report["sound"], report["warnings"]) == (3, True, 1)
    with chain.open("r+b") as file:
        for offset in (192 * KIB, 256 * KIB):
            file.seek(offset + 8)
            file.write(b"\xff")
    before = chain.read_bytes()
    code, report = disk_json("check", chain)
    assert code == 12 and not report["sound"]
    assert {finding["offset"] for finding in report["findings"]} >= {192 * KIB, 256 * KIB}
    assert chain.read_bytes() == before


def test_check_of_a_vhd_names_each_wrong_block(tmp_path: Path) -> None:
    path = tmp_path / "x.vhd"
    create_dynamic(path, 16 * MIB)
    with path.open("r+b") as file:
        file.seek(1536)
        file.write(b"\x00\x00\x00\x01\x7f\xff\xff\xff")
    code, report = disk_json("check", path)
    assert code == 12
    assert {(finding["offset"], finding["severity"]) for finding in report["findings"]} >= {
        (1536, "error"),
        (1540, "error"),
    }


def test_check_of_a_vhd_without_its_parent_is_a_warning(tmp_path: Path) -> None:
    from uuid import UUID  # noqa: PLC0415

    write_child(tmp_path / "c.vhd", size=MIB, parent=UUID(int=1), sectors={}, relative="none.vhd")
    assert disk_json("check", tmp_path / "c.vhd")[0] == 3


# --- map and diff


def test_map_and_diff_list_extents(chain: Path, tmp_path: Path) -> None:
    _, found = disk_json("map", chain)
    extents = {(item["offset"], item["length"]) for item in found["extents"]}
    assert (0, MIB) in extents and len(extents) == 3
    _, found = disk_json("map", "--own", chain)
    own = [(item["offset"], item["length"]) for item in found["extents"]]
    assert own == [(5 * MIB, 1024)]
    _, found = disk_json("diff", chain)
    assert [(item["offset"], item["length"]) for item in found["extents"]] == own
    _, found = disk_json("diff", chain, "--since", tmp_path / "base.vhdx")
    assert [item["offset"] for item in found["extents"]] == [3 * MIB, 5 * MIB]
    code, text, err = godwit("disk", "map", chain)
    assert code == 0 and text.splitlines()[0].split() == ["OFFSET", "LENGTH"] and "3 extents" in err


def test_diff_of_two_disks_reads_and_compares(chain: Path, tmp_path: Path) -> None:
    code, found = disk_json("diff", chain, tmp_path / "child.avhdx")
    assert code == 1
    assert not found["same_content"]
    assert found["extents"] == [{"offset": 5 * MIB, "length": 1024}]
    code, found = disk_json("diff", chain, chain)
    assert (code, found["identical"], found["extents"]) == (0, True, [])


# --- commands that write


def test_convert_takes_the_format_from_the_name_and_verifies(chain: Path, tmp_path: Path) -> None:
    code, done = disk_json("convert", chain, tmp_path / "flat.raw", "--verify")
    assert (code, done["format"], done["verified"]) == (0, "raw", True)
    with open_disk(chain) as disk:
        assert (tmp_path / "flat.raw").read_bytes() == disk.read_at(0, disk.size)
    code, failed = disk_json("convert", chain, tmp_path / "flat.raw")
    assert code == 1 and "exists" in failed["error"]["message"]
    assert godwit("disk", "convert", chain, tmp_path / "flat.raw", "--overwrite", "-f", "vhd")[0] == 0
    assert disk_json("info", tmp_path / "flat.raw")[1]["format"] == "vhd"


def test_a_format_that_no_name_tells_is_asked_for(chain: Path, tmp_path: Path) -> None:
    code, _, err = godwit("disk", "convert", chain, tmp_path / "x.frob")
    assert code != 0 and "format" in err


def test_parents_elsewhere_need_permission(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    child = tmp_path / "other" / "new.avhdx"
    assert godwit("disk", "create", child, "--parent", chain)[0] == 0
    code, failed = disk_json("convert", child, tmp_path / "x.raw")
    assert code == 1 and failed["error"]["type"] == "ParentError" and failed["error"]["hint"]
    assert godwit("disk", "convert", child, tmp_path / "x.raw", "--parent-folder", tmp_path)[0] == 0


def test_merge_asks_first_and_can_be_tried(chain: Path, tmp_path: Path) -> None:
    with open_disk(chain) as disk:
        content = disk.read_at(0, disk.size)
    code, plan = disk_json("merge", chain, "--dry-run")
    assert (code, plan["data_bytes"], plan["dry_run"]) == (0, 1024, True)
    code, _, err = godwit("disk", "merge", chain)
    assert code == 2 and "--yes" in err
    assert chain.exists()
    code, done = disk_json("merge", chain, "--yes")
    assert code == 0 and done["parent"].endswith("child.avhdx")
    assert not chain.exists()
    with open_disk(tmp_path / "child.avhdx") as disk:
        assert disk.read_at(0, disk.size) == content


def test_create_resize_compact(tmp_path: Path) -> None:
    for name, format in (("a.vhdx", "vhdx"), ("a.vhd", "vhd"), ("a.raw", "raw")):  # noqa: A001
        path = tmp_path / name
        code, made = disk_json("create", path, "8M")
        assert (code, made["format"], made["virtual_size"]) == (0, format, 8 * MIB)
        with open_disk(path, writable=True) as disk:
            disk.write_at(5 * MIB, b"data")
        code, plan = disk_json("resize", path, "16M", "--dry-run")
        assert code == 0 and plan["new_size"] == 16 * MIB
        assert disk_json("info", path)[1]["virtual_size"] == 8 * MIB
        assert godwit("disk", "resize", path, "16M", "--yes")[0] == 0
        with open_disk(path) as disk:
            assert disk.size == 16 * MIB
            assert disk.read_at(5 * MIB, 11 * MIB) == b"data" + bytes(11 * MIB - 4)
        code, _, err = godwit("disk", "resize", path, "4M", "--yes")
        assert code == 2 and "data stands" in err
        assert godwit("disk", "resize", path, "6M", "--yes")[0] == 0
        assert disk_json("compact", path, "--yes")[0] == 0
        assert godwit("disk", "check", path)[0] == 0
        with open_disk(path) as disk:
            assert disk.size == 6 * MIB
            assert disk.read_at(0, 6 * MIB) == bytes(5 * MIB) + b"data" + bytes(MIB - 4)
        assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".tmp")] == []


def test_compact_of_raw_makes_holes(tmp_path: Path) -> None:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(8 * MIB) + b"x" * 512 + bytes(MIB - 512))
    code, done = disk_json("compact", path, "--yes")
    assert code == 0 and done["file_size_after"] == 9 * MIB
    assert path.stat().st_blocks * 512 <= 2 * MIB
    assert path.read_bytes() == bytes(8 * MIB) + b"x" * 512 + bytes(MIB - 512)


def test_create_of_a_child(chain: Path, tmp_path: Path) -> None:
    code, made = disk_json("create", tmp_path / "new.avhdx", "--parent", chain)
    assert (code, made["virtual_size"]) == (0, 8 * MIB)
    assert disk_json("info", tmp_path / "new.avhdx")[1]["chain"][1]["path"].endswith("top.avhdx")


@pytest.mark.parametrize("command", [["resize", "x", "8M"], ["merge"], ["compact"]])
def test_a_dynamic_vhd_says_what_to_do_instead(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "x.vhd"
    create_dynamic(path, 4 * MIB)
    arguments = [path if argument == "x" else argument for argument in command]
    arguments += [] if path in arguments else [path]
    code, failed = disk_json(*arguments, "--yes")
    assert code == 1 and "convert" in failed["error"]["hint"]


# --- wrong input


@pytest.mark.parametrize("command", ["info", "check", "map", "diff"])
@pytest.mark.parametrize("what", ["missing", "folder", "empty", "text", "no permission", "pipe"])
def test_what_is_no_image_gives_a_sentence_that_names_it(tmp_path: Path, command: str, what: str) -> None:
    path = tmp_path / "thing"
    match what:
        case "folder":
            path.mkdir()
        case "empty":
            path.touch()
        case "text":
            path.write_text("hello\n")
        case "pipe":
            os.mkfifo(path)
        case "no permission":
            create_disk(path, size=MIB)
            path.chmod(0)
            if os.access(path, os.R_OK):
                pytest.skip("this user may read everything")
    code, failed = disk_json(command, path)
    assert code == 1
    assert failed["error"]["path"] == str(path)
    assert failed["error"]["exit_code"] == 1


def test_a_damaged_image_exits_with_12(tmp_path: Path) -> None:
    path = tmp_path / "x.vhdx"
    create_disk(path, size=MIB)
    os.truncate(path, 2_000_000)
    for command in ("info", "map", "check"):
        assert godwit("disk", command, path)[0] == 12


def test_errors_name_the_target_and_not_its_temporary_file(tmp_path: Path) -> None:
    code, failed = disk_json("create", tmp_path / "x.vhd", "3T")
    assert (code, failed["error"]["path"]) == (2, str(tmp_path / "x.vhd"))
    source = tmp_path / "big.vhdx"
    create_disk(source, size=3 << 40)
    code, failed = disk_json("convert", source, tmp_path / "y.vhd")
    assert (code, failed["error"]["path"]) == (2, str(tmp_path / "y.vhd"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    source = tmp_path / "source.raw"
    with source.open("wb") as file:
        for _ in range(48):
            file.write(os.urandom(MIB) * 8)
    target = tmp_path / "out"
    target.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", "from cli.main import main; main()", "disk", "convert", source, target / "x.vhdx"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any(target.iterdir()) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the conversion was done before the signal came")
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert list(target.iterdir()) == []


INTERRUPTED_AT_CREATION = """
import vhdx.osfile
make = vhdx.osfile._new_file
def interrupted(path, *, writable=False, create=False):
    file = make(path, writable=writable, create=create)
    if create:
        raise KeyboardInterrupt
    return file
vhdx.osfile._new_file = interrupted
from cli.main import main
main()
"""


@pytest.mark.parametrize("name", ["x.vhdx", "x.vhd", "x.raw"])
def test_an_interruption_between_making_a_file_and_remembering_it_leaves_nothing(tmp_path: Path, name: str) -> None:
    source = tmp_path / "source.raw"
    source.write_bytes(bytes(MIB))
    target = tmp_path / "out"
    target.mkdir()
    command = [sys.executable, "-c", INTERRUPTED_AT_CREATION, "disk", "convert", str(source), str(target / name)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert list(target.iterdir()) == []


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_qcow2_goes_in_and_out(chain: Path, tmp_path: Path) -> None:
    assert godwit("disk", "convert", chain, tmp_path / "x.qcow2", "--verify")[0] == 0
    assert disk_json("info", tmp_path / "x.qcow2")[1]["virtual_size"] == 8 * MIB
    assert godwit("disk", "convert", tmp_path / "x.qcow2", tmp_path / "y.vhdx")[0] == 0
    assert disk_json("diff", chain, tmp_path / "y.vhdx")[0] == 0
    code, failed = disk_json("map", tmp_path / "x.qcow2")
    assert code == 1 and "convert" in failed["error"]["hint"]
