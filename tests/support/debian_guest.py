"""Builds a small Debian virtual machine of Generation 2: GPT, an EFI system partition, ext4, GRUB for UEFI.

No loop device and no mount is used, and no privilege beyond what mmdebstrap needs (root, or unprivileged user
namespaces). The system is installed once, into an archive, from which any layout of disks is made (see
``tests.support.linux_guests`` for others); the file systems are written straight into their partitions of a sparse
raw file.

On every boot the guest runs ``godwit-guest``, which prints one line to the serial console and then runs whatever
shell commands the virtual machine's SMBIOS serial number carries (see ``tests.support.qemu``):

    GODWIT-READY firmware=uefi journal=2 last=<last line of /var/lib/godwit/journal>
    GODWIT-OUT <what the commands print, line by line>
    GODWIT-DONE status=0

Run as a program it writes such a disk: ``python -m tests.support.debian_guest TARGET.raw``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

MIB = 1 << 20
SIZE_BYTES = 2048 * MIB
ESP_START_BYTES = 1 * MIB
ESP_SIZE_BYTES = 64 * MIB
ROOT_START_BYTES = ESP_START_BYTES + ESP_SIZE_BYTES
ROOT_SIZE_BYTES = SIZE_BYTES - ROOT_START_BYTES - 1 * MIB  # the last MiB is the backup partition table's

# Fixed, so that two builds of one recipe differ only by what Debian has updated in between.
DISK_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000001"
ESP_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000002"
ROOT_PARTITION_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000003"
ROOT_UUID = "6f0d3c52-8e43-4d5e-9a53-60d170000004"
ESP_VOLUME_ID = "60D17001"
MACHINE_ID = "6f0d3c528e434d5e9a5360d170000005"
PASSWORD = "godwit"

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # an ordinary user's PATH on Debian lacks the last two
SUITE = "bookworm"
GRUB_IMAGE = Path("/usr/lib/grub/x86_64-efi/monolithic/grubx64.efi")
PACKAGES = (
    *("systemd-sysv", "udev", "e2fsprogs", "initramfs-tools", "zstd", "linux-image-cloud-amd64"),
    *("lvm2", "xfsprogs", "btrfs-progs", "systemd-boot-efi"),  # for other layouts
    *("dbus", "qemu-guest-agent"),  # by them a recovery machine is shut down, and what is in it is asked
)
TOOLS = ("mmdebstrap", "mke2fs", "sfdisk", "mkfs.vfat", "mcopy")

PARTITIONS = f"""\
label: gpt
label-id: {DISK_UUID}
unit: sectors
start={ESP_START_BYTES // 512}, size={ESP_SIZE_BYTES // 512}, type=uefi, uuid={ESP_UUID}, name="EFI system"
start={ROOT_START_BYTES // 512}, size={ROOT_SIZE_BYTES // 512}, type=linux, uuid={ROOT_PARTITION_UUID}, name="root"
"""

# What Debian's grub-install leaves on the ESP: find the root file system, go on with the configuration there.
GRUB_STUB = f"""\
search.fs_uuid {ROOT_UUID} root
set prefix=($root)'/boot/grub'
configfile $prefix/grub.cfg
"""

GUEST_PROGRAM = """\
#!/bin/sh
# Tells the console that the machine is up, then runs the commands given by whoever started it.
journal=/var/lib/godwit/journal
[ -d /sys/firmware/efi ] && firmware=uefi || firmware=bios
say() { printf '\\n%s\\n' "$*" > /dev/ttyS0; }
say "GODWIT-READY firmware=$firmware journal=$(wc -l < $journal) last=$(tail -n 1 $journal)"
serial=$(cat /sys/class/dmi/id/product_serial 2>/dev/null)
case "$serial" in
godwit:*)
    sh -c "${serial#godwit:}" > /run/godwit-out 2>&1
    status=$?
    sync
    sed 's/^/GODWIT-OUT /' /run/godwit-out > /dev/ttyS0
    say "GODWIT-DONE status=$status"
    case "$serial" in *'#poweroff') systemctl poweroff ;; esac
    ;;
esac
"""

GUEST_SERVICE = """\
[Unit]
Description=Tell the serial console that the machine is up
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/godwit-guest
[Install]
WantedBy=multi-user.target
"""

# Run by mmdebstrap with the new system's folder as its argument, before packages beyond the essential ones are there.
PREPARE = """\
#!/bin/sh
set -eu
mkdir -p "$1/etc/initramfs-tools/conf.d"
printf 'COMPRESS=zstd\\nCOMPRESSLEVEL=1\\n' > "$1/etc/initramfs-tools/conf.d/quick"
"""

# Run by mmdebstrap at the end.
FINISH = f"""\
#!/bin/sh
set -eu
cd "$1"
printf 'godwit-demo\\n' > etc/hostname
printf '{MACHINE_ID}\\n' > etc/machine-id
printf 'root:{PASSWORD}\\n' | chroot . chpasswd
mkdir -p boot/efi boot/grub var/lib/godwit
printf 'built\\n' > var/lib/godwit/journal
cp "$GODWIT_WORK/godwit-guest" usr/local/sbin/godwit-guest
chmod 755 usr/local/sbin/godwit-guest
cp "$GODWIT_WORK/godwit-guest.service" etc/systemd/system/
chroot . systemctl enable godwit-guest.service serial-getty@ttyS0.service
chroot . systemctl mask apt-daily.timer apt-daily-upgrade.timer systemd-networkd-wait-online.service
chroot . systemctl mask lvm2-monitor.service xfs_scrub_all.timer e2scrub_all.timer e2scrub_reap.service
rm -rf var/cache/apt/* var/lib/apt/lists/* var/log/*.log var/cache/debconf/*-old
"""

# Unpacks the system below the working folder, adds the layout's own files, and makes the file systems from that.
MAKE = """\
set -eu
cd "$GODWIT_WORK"
mkdir tree
cd tree
tar -xpf - --numeric-owner --exclude='./dev/*'
cp -r "$GODWIT_WORK/files/." .
. "$GODWIT_WORK/make-file-systems"
cd "$GODWIT_WORK"
rm -rf tree
"""

FSTAB = f"""\
UUID={ROOT_UUID} / ext4 errors=remount-ro 0 1
UUID={ESP_VOLUME_ID[:4]}-{ESP_VOLUME_ID[4:]} /boot/efi vfat umask=0077 0 1
"""

GRUB_CONFIGURATION = f"""\
set timeout=0
menuentry 'Debian GNU/Linux' {{
    search --no-floppy --fs-uuid --set=root {ROOT_UUID}
    linux /boot/vmlinuz-@KERNEL@ root=UUID={ROOT_UUID} ro console=tty0 console=ttyS0,115200
    initrd /boot/initrd.img-@KERNEL@
}}
"""

# Makes the ext4 from the folder it is run in, in its place on the disk.
MAKE_ROOT = f"""\
mke2fs -q -F -t ext4 -O '^orphan_file,^metadata_csum_seed' -L root -U {ROOT_UUID} \\
    -E offset={ROOT_START_BYTES},hash_seed={ROOT_UUID},root_owner=0:0 -d . "$GODWIT_IMAGE" {ROOT_SIZE_BYTES // 1024}k
"""

EXCLUDED = (
    "/usr/share/man/*",
    "/usr/share/info/*",
    "/usr/share/doc/*",
    "/usr/share/locale/*",
    "/usr/share/i18n/*",
    "/usr/share/bash-completion/*",
)
# Drivers no emulated or hypervisor's machine has; leaving them out halves the time the initramfs takes.
EXCLUDED_MODULES = ("drivers/infiniband", "drivers/net/ethernet", "drivers/net/wireless", "sound", "fs/ocfs2")


class GuestBuildError(RuntimeError):
    """The virtual machine could not be built; the message says which step failed and how."""


def cache_dir() -> Path:
    """The folder in which built guests are kept: GODWIT_CACHE, else ~/.cache/godwit-tests."""
    configured = os.environ.get("GODWIT_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "godwit-tests"


def recipe_key() -> str:
    """A name for this recipe: it changes whenever this module does."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def missing_tools() -> list[str]:
    """The programs that building needs and that are not installed."""
    missing = [tool for tool in TOOLS if which(tool) is None]
    return missing if GRUB_IMAGE.exists() else [*missing, str(GRUB_IMAGE)]


def which(program: str) -> str | None:
    """Return the path of a program, or None where it is not installed."""
    return shutil.which(program, path=PATH)


def cached_guest() -> Path:
    """Return the raw disk of the guest, building it unless an equal one is in the cache. Never write to it.

    Several processes may ask at once: one builds, the others wait. Raises GuestBuildError.
    """
    return cached("debian-generation2", recipe_key(), ".raw", build)


def cached_system() -> Path:
    """Return a tar archive of the system, with its kernels but nothing of a layout, installed unless it is kept."""
    return cached("debian-system", recipe_key(), ".tar", install)


def cached(name: str, key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """Return the file ``name`` of this ``key`` from the cache, made unless it is there; other keys' are removed."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}-{key}{suffix}"
    with _locked(folder / f"{name}.lock"):
        if not target.exists():
            for stale in folder.glob(f"{name}-{'?' * 16}{suffix}"):
                stale.unlink()
            make(target)
    return target


def install(target: Path) -> None:
    """Write the system to ``target``, a tar archive. Takes about 40 seconds. Raises GuestBuildError."""
    _refuse_without_tools()
    # Under a user namespace the hooks run as another user, who must get at the files by their paths.
    with tempfile.TemporaryDirectory(prefix="godwit-guest-") as name:
        work = Path(name)
        work.chmod(0o755)
        for script, text in (
            ("prepare", PREPARE),
            ("finish", FINISH),
            ("godwit-guest", GUEST_PROGRAM),
            ("godwit-guest.service", GUEST_SERVICE),
        ):
            path = work / script
            path.write_text(text)
            path.chmod(0o644 if path.suffix else 0o755)
        options = [f"--dpkgopt=path-exclude={path}" for path in EXCLUDED]
        options += [f"--dpkgopt=path-exclude=/lib/modules/*/kernel/{path}/*" for path in EXCLUDED_MODULES]
        options += [f"--aptopt={line}" for line in _apt_proxies()]
        partial = target.with_suffix(".partial")
        run(
            *("mmdebstrap", "--quiet", "--variant=apt", "--format=tar", f"--include={','.join(PACKAGES)}"),
            *("--dpkgopt=force-unsafe-io", *options),
            *(f"--essential-hook={work / 'prepare'}", f"--customize-hook={work / 'finish'}"),
            *(SUITE, str(partial), *_apt_sources()),
            extra_environment={"GODWIT_WORK": str(work)},
        )
        partial.rename(target)


def build(target: Path) -> None:
    """Write the guest's disk to ``target``, a sparse raw file of SIZE_BYTES, from the system kept in the cache.

    Raises GuestBuildError.
    """
    _refuse_without_tools()
    with workshop(target) as (image, work):
        partition(image, PARTITIONS)
        files = {"EFI/debian/grub.cfg": GRUB_STUB.encode()}
        files |= dict.fromkeys(("EFI/debian/grubx64.efi", "EFI/BOOT/BOOTX64.EFI"), GRUB_IMAGE.read_bytes())
        write_esp(image, work, files)
        configuration = GRUB_CONFIGURATION.replace("@KERNEL@", kernel_version())
        make_file_systems(image, work, {"etc/fstab": FSTAB, "boot/grub/grub.cfg": configuration}, MAKE_ROOT)


@contextmanager
def workshop(target: Path, size_bytes: int = SIZE_BYTES) -> Iterator[tuple[Path, Path]]:
    """Give an empty disk and a folder to work in; at the end the disk becomes ``target``."""
    with tempfile.TemporaryDirectory(prefix="godwit-guest-") as name:
        work = Path(name)
        work.chmod(0o777)  # in a user namespace others work in it
        image = work / "disk.raw"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        image.chmod(0o666)
        yield image, work
        partial = target.with_suffix(".partial")
        run("cp", "--sparse=always", str(image), str(partial))
        partial.rename(target)


def partition(image: Path, description: str) -> None:
    """Write the partition table that ``description``, a script of sfdisk, tells of."""
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", str(image), stdin=description)


def kernel_version() -> str:
    """Return the version of the newest kernel in the system, as in the names of its files in /boot."""
    with tarfile.open(cached_system()) as archive:
        names = [name.rpartition("vmlinuz-")[2] for name in archive.getnames() if name.startswith("./boot/vmlinuz-")]
    return max(names)


def system_file(name: str) -> bytes:
    """Return what the file of the system named by its path without a leading slash holds."""
    with tarfile.open(cached_system()) as archive:
        member = archive.extractfile(f"./{name}")
        assert member is not None, f"{name} is no file"
        return member.read()


def make_file_systems(image: Path, work: Path, files: dict[str, str], script: str) -> None:
    """Run ``script`` as root, if need be of a user namespace, in a folder with the system and ``files``."""
    for name, text in files.items():
        path = work / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (work / "make-file-systems").write_text(script)
    (work / "make").write_text(MAKE)
    command = ["sh", str(work / "make")]
    if os.geteuid() != 0:
        command = ["mmdebstrap", "--unshare-helper", *command]
    with cached_system().open("rb") as archive:
        run(*command, stdin=archive, extra_environment={"GODWIT_IMAGE": str(image), "GODWIT_WORK": str(work)})


def write_esp(image: Path, work: Path, files: dict[str, bytes]) -> None:
    """Make the EFI system partition with ``files`` in it."""
    start_sector, size_kib = ESP_START_BYTES // 512, ESP_SIZE_BYTES // 1024
    run(
        *("mkfs.vfat", "-F", "32", "-s", "1", "-n", "ESP", "-i", ESP_VOLUME_ID),
        *("--offset", str(start_sector), str(image), str(size_kib)),
    )
    update_esp(image, work, files)


def update_esp(image: Path, work: Path, files: dict[str, bytes]) -> None:
    """Put ``files`` into the EFI system partition, in the place of those of the same names."""
    drive = f"{image}@@{ESP_START_BYTES}"
    folders = {str(parent) for name in files for parent in Path("/", name).parents} - {"/"}
    for folder in sorted(folders):
        run("mmd", "-D", "s", "-i", drive, f"::{folder}", fine=(0, 1))  # skipped where it is there
    for name, content in files.items():
        path = work / "esp-file"
        path.write_bytes(content)
        run("mcopy", "-o", "-i", drive, str(path), f"::/{name}")


def _refuse_without_tools() -> None:
    missing = missing_tools()
    if missing:
        raise GuestBuildError(f"not installed: {', '.join(missing)}; `make setup` installs what is needed")


def _apt_sources() -> list[str]:
    """The Debian archives this machine itself installs from, as one-line sources.

    A machine that runs another release falls back to the first mirror it has for its own; raises GuestBuildError
    where no Debian archive is configured at all.
    """
    text = run("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI) $(RELEASE) $(COMPONENT)")
    rows = sorted({tuple(line.split()) for line in text.splitlines() if line.startswith("Debian ")})
    wanted = {SUITE, f"{SUITE}-updates", f"{SUITE}-security"}
    lines = [
        f"deb {_mirror(uri)} {release} {component}"
        for _, uri, release, component in rows
        if release in wanted and component == "main"
    ]
    if not any(f" {SUITE} main" in line for line in lines):
        main = [uri for _, uri, release, _ in rows if "-" not in release]
        if not main:
            raise GuestBuildError("apt knows no Debian archive here; run `apt-get update` on a Debian machine first")
        lines = [f"deb {_mirror(main[0])} {SUITE} main"]
    return lines


def _mirror(uri: str) -> str:
    """Follow ``mirror+file:``, as cloud images use, to the first mirror that the file names."""
    if not uri.startswith("mirror+file:"):
        return uri
    listed = Path(uri.removeprefix("mirror+file:").rstrip("/")).read_text().split()
    return next(entry for entry in listed if "://" in entry)


def _apt_proxies() -> list[str]:
    text = run("apt-config", "dump")
    return [line for line in text.splitlines() if line.startswith("Acquire::http") and "::Proxy " in line]


def run(
    *command: str,
    stdin: str | IO[bytes] = "",
    extra_environment: dict[str, str] | None = None,
    fine: tuple[int, ...] = (0,),
) -> str:
    """Run a program and return what it says. Raises GuestBuildError unless its status is one that is ``fine``."""
    environment = {**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8", **(extra_environment or {})}
    with tempfile.TemporaryFile() as given:
        if isinstance(stdin, str):
            given.write(stdin.encode())
            given.seek(0)
        done = subprocess.run(
            command,
            check=False,
            stdin=given if isinstance(stdin, str) else stdin,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
        )
    if done.returncode not in fine:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise GuestBuildError(f"{command[0]} failed with status {done.returncode}:\n{tail}")
    return done.stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Build the guest where the first argument says."""
    started = time.monotonic()
    build(Path(sys.argv[1]))
    print(f"built {sys.argv[1]} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    main()
