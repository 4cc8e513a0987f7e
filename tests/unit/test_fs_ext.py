"""ext2, ext3 and ext4 as mke2fs makes them, the journal as debugfs writes it, and damaged ones."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from conversion.errors import ConversionError, DamagedError, UnsupportedError
from conversion.filesystems.ext import ExtFileSystem
from conversion.filesystems.walk import crc32c
from tests.support.linux_filesystems import DamagedDevice, FileDevice, check_links, check_tree, run, sample_tree

KINDS = {
    "ext4": ("-t", "ext4"),
    "ext4-1k": ("-t", "ext4", "-b", "1024"),
    "ext4-inline": ("-t", "ext4", "-O", "inline_data", "-I", "512"),
    "ext4-plain": ("-t", "ext4", "-O", "^metadata_csum,^64bit"),
    "ext4-meta-bg": ("-t", "ext4", "-O", "meta_bg,^resize_inode", "-b", "1024", "-g", "1024"),
    "ext4-bigalloc": ("-t", "ext4", "-O", "bigalloc"),
    "ext4-seed": ("-t", "ext4", "-O", "metadata_csum_seed,orphan_file"),
    "ext3": ("-t", "ext3", "-b", "1024"),
    "ext2": ("-t", "ext2", "-b", "1024", "-I", "128"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_tree(tmp_path_factory.mktemp("tree"))


def make(image: Path, tree: Path, *options: str, size: str = "16M") -> Path:
    run("mke2fs", "-q", "-F", "-L", "a label", *options, "-d", tree, image, size)
    return image


@pytest.mark.parametrize("kind", KINDS)
def test_reads_what_mke2fs_wrote(kind: str, tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, *KINDS[kind])
    reader = ExtFileSystem(FileDevice(image))
    assert reader.kind == kind[:4] == run("blkid", "-p", "-o", "value", "-s", "TYPE", image).strip()
    assert reader.uuid == run("blkid", "-p", "-o", "value", "-s", "UUID", image).strip()
    assert reader.label == "a label"
    assert not reader.is_dirty
    check_tree(reader, tree)
    check_links(reader)
    assert reader.read_file("/long") == b"guest\n"
    raw = image.read_bytes()
    for name in ("large", "block"):
        extents = reader.extents(name)
        assert extents is not None
        assert b"".join(raw[at : at + size] for at, size in extents) == (tree / name).read_bytes()
    assert reader.extents("sparse") is None
    assert (reader.extents("short") is None) == (kind == "ext4-inline")
    assert reader.extents("etc") is None
    with pytest.raises(DamagedError, match="more than 1000"):
        reader.read_file("large", largest_bytes=1000)


def test_an_unknown_feature_is_refused_by_name(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, *KINDS["ext4-plain"])
    content = bytearray(image.read_bytes())
    content[1024 + 0x63] |= 0x40
    with pytest.raises(UnsupportedError, match="0x40000000"):
        ExtFileSystem(FileDevice(bytes(content)))
    content[1024 + 0x63] &= ~0x40
    content[1024 + 0x60] |= 1
    with pytest.raises(UnsupportedError, match="compression"):
        ExtFileSystem(FileDevice(bytes(content)))


@pytest.fixture(params=["no checksums", "checksums", "revoked"])
def journalled(request: pytest.FixtureRequest, tree: Path, tmp_path: Path) -> tuple[Path, Path, str]:
    """A file system whose newest change is in its journal alone, and the same one after e2fsck replayed it."""
    options = ["-t", "ext4", "-b", "1024"] + (["-O", "^metadata_csum"] if request.param == "no checksums" else [])
    before = make(tmp_path / "before", tree, *options, size="16M")
    after = tmp_path / "after"
    shutil.copy(before, after)
    added = tmp_path / "added"
    added.write_bytes(b"a new kernel\n" * 50)
    run("debugfs", "-w", "-f", "-", after, stdin=f"write {added} new\nrm short\nquit\n")
    old, new = before.read_bytes(), after.read_bytes()
    changed = [at for at in range(0, len(old), 1024) if old[at : at + 1024] != new[at : at + 1024]]
    blocks = ",".join(str(at // 1024) for at in changed)
    contents = tmp_path / "contents"
    contents.write_bytes(b"".join(new[at : at + 1024] for at in changed))
    opened = "jo -c" if request.param == "checksums" else "jo"
    commands = f"{opened}\njw -b {blocks} {contents}\n"
    if request.param == "revoked":
        commands += f"jw -r {blocks}\n"
    run("debugfs", "-w", "-f", "-", before, stdin=f"{commands}jc\nquit\n")
    replayed = tmp_path / "replayed"
    shutil.copy(before, replayed)
    run("e2fsck", "-E", "journal_only", "-p", replayed)
    return before, replayed, request.param


def test_the_journal_is_replayed_as_e2fsck_does(journalled: tuple[Path, Path, str]) -> None:
    dirty, replayed, kind = journalled
    reader, judge = ExtFileSystem(FileDevice(dirty)), ExtFileSystem(FileDevice(replayed))
    assert reader.is_dirty
    assert not judge.is_dirty
    assert reader.replay.transactions == (2 if kind == "revoked" else 1)
    assert reader.list_folder("/") == judge.list_folder("/")
    assert reader.read_file("new") == judge.read_file("new") == (None if kind == "revoked" else b"a new kernel\n" * 50)
    assert (reader.read_file("short") is None) == (kind != "revoked")
    # The new file's data went through the journal as well: a replay would undo what is written over them.
    assert reader.extents("new") is None
    assert reader.extents("large") == judge.extents("large") is not None


def test_an_unfinished_transaction_is_not_replayed(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, "-t", "ext4", "-b", "1024")
    contents = tmp_path / "contents"
    contents.write_bytes(bytes(1024))
    root = run("debugfs", "-R", "blocks /", image).split()[0]
    run("debugfs", "-w", "-f", "-", image, stdin=f"jo -c\njw -b {root} {contents}\njc\nquit\n")
    whole = FileDevice(image)
    assert ExtFileSystem(whole).replay.transactions == 1
    commit = image.read_bytes().index(bytes.fromhex("c03b399800000002"))
    reader = ExtFileSystem(DamagedDevice(whole, {commit + 16: whole.read_at(commit + 16, 1)[0] ^ 1}))
    assert reader.is_dirty
    assert reader.replay.transactions == 0
    check_tree(reader, tree)


def test_a_journalled_block_that_fails_its_checksum_is_damage(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, "-t", "ext4", "-b", "1024")
    contents = tmp_path / "contents"
    contents.write_bytes(b"\xa7" * 1024)
    root = run("debugfs", "-R", "blocks /", image).split()[0]
    run("debugfs", "-w", "-f", "-", image, stdin=f"jo -c\njw -b {root} {contents}\njc\nquit\n")
    at = image.read_bytes().index(b"\xa7" * 1024)
    with pytest.raises(DamagedError, match=r"journal fails its checksum"):
        ExtFileSystem(DamagedDevice(FileDevice(image), {at + 5: 0})).list_folder("/")


@pytest.mark.parametrize("kind", ["ext4", "ext4-plain", "ext2", "ext4-inline"])
def test_damage_ends_in_an_error_of_ours(kind: str, tree: Path, tmp_path: Path) -> None:
    image = FileDevice(make(tmp_path / "image", tree, *KINDS[kind]).read_bytes())
    chance = random.Random(11)
    used = [at for at in range(0, image.size, 512) if any(image.read_at(at, 512))]
    used = [at for at in used if at < 3 << 20] * 3 + [1024] * 500 + used
    failures = 0
    assert survives(DamagedDevice(image, {}))
    for _ in range(50):
        places = chance.choices(used, k=chance.choice([1, 3, 30]))
        changed = {at + chance.randrange(512): chance.choice([0, 1, 255, chance.randrange(256)]) for at in places}
        failures += not survives(DamagedDevice(image, changed))
    for size in [0, 1023, 1024, 2047, 2048, 4096, 10_000, 65536, 1 << 20]:
        assert not survives(DamagedDevice(image, {}, size))
    assert failures


def test_with_checksums_no_change_of_metadata_goes_unseen(tree: Path, tmp_path: Path) -> None:
    image = FileDevice(make(tmp_path / "image", tree, "-t", "ext4", "-b", "4096"))
    root = int(run("debugfs", "-R", "blocks /", tmp_path / "image").split()[0]) * 4096
    inode = int(run("debugfs", "-R", "imap <2>", tmp_path / "image").split("at block ")[1].split(",")[0]) * 4096
    for at in (1024 + 0x20, 4096 + 8, inode + 256 + 4, root + 8):
        device = DamagedDevice(image, {at: image.read_at(at, 1)[0] ^ 4})
        with pytest.raises(DamagedError, match="checksum"):
            ExtFileSystem(device).list_folder("/")


def survives(device: DamagedDevice) -> bool:
    """Read everything; return whether nothing was found amiss. Only the project's own errors may leave."""
    try:
        reader = ExtFileSystem(device)
        pending, seen = ["/"], 0
        while pending and seen < 400:
            folder = pending.pop()
            for entry in reader.list_folder(folder) or ():
                seen += 1
                path = f"{folder}/{entry.name}"
                if entry.kind == "folder" and path.count("/") < 6:
                    pending.append(path)
                else:
                    reader.read_file(path, largest_bytes=2 << 20)
                    reader.extents(path)
    except ConversionError:
        return False
    return True


def test_crc32c_chains_as_the_kernel_does() -> None:
    whole = crc32c(0xFFFFFFFF, b"123456789")
    assert whole ^ 0xFFFFFFFF == 0xE3069283
    assert crc32c(crc32c(0xFFFFFFFF, b"1234"), b"56789") == whole


def test_folders_with_a_hash_tree(tree: Path, tmp_path: Path) -> None:
    image = make(tmp_path / "image", tree, "-t", "ext4", "-b", "1024")
    run("e2fsck", "-f", "-y", "-D", image)
    assert "Flags: 0x81000" in run("debugfs", "-R", "stat /many", image)
    check_tree(ExtFileSystem(FileDevice(image)), tree)
    # The kernel turns a block of entries into the tree's root and leaves the old block's end in what is unused there.
    end = (int(run("debugfs", "-R", "bmap /many 0", image)) + 1) * 1024
    stale = dict(zip(range(end - 12, end - 4), b"\0\0\0\0\x0c\0\0\xde", strict=True))
    check_tree(ExtFileSystem(DamagedDevice(FileDevice(image), stale)), tree)
