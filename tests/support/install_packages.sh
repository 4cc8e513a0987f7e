#!/bin/sh
# Installs the Debian packages that building and booting test machines need: only those missing, asking for root only then.
#   install_packages.sh python|machines|browser...
set -eu

python="python3 python3-venv"
machines="qemu-utils qemu-system-x86 ovmf mmdebstrap uidmap fdisk gdisk dosfstools mtools e2fsprogs grub-efi-amd64-bin grub-pc-bin grub-common libhivex-bin libwin-hivex-perl ntfs-3g xfsprogs btrfs-progs nasm libnbd-bin libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
browser="chromium fonts-dejavu-core"

wanted=""
for set in "$@"; do
    case "$set" in
    python) wanted="$wanted $python" ;;
    machines) wanted="$wanted $machines" ;;
    browser) wanted="$wanted $browser" ;;
    *) echo "unknown set of packages: $set" >&2; exit 2 ;;
    esac
done

if ! command -v apt-get >/dev/null; then
    echo "This is not a Debian system. Install what these Debian packages hold, then go on:$wanted" >&2
    exit 0
fi

missing=""
for package in $wanted; do
    case "$(dpkg-query --show --showformat '${db:Status-Status}' "$package" 2>/dev/null || true)" in
    installed) ;;
    *) missing="$missing $package" ;;
    esac
done
# A Python that is not Debian's own needs none of Debian's.
case "$missing" in
*python3*) if "${PYTHON:-python3}" -c 'import ensurepip, venv' 2>/dev/null; then
    missing=$(printf '%s\n' $missing | grep -v '^python3' | tr '\n' ' ')
fi ;;
esac
[ -n "$(printf %s "$missing" | tr -d ' ')" ] || exit 0

as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        echo "Not root, and sudo is not installed. Run as root: apt-get install$missing" >&2
        exit 1
    fi
    as_root="sudo"
fi
echo "Installing Debian packages:$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Recommended packages would bring a graphical desktop's worth of QEMU with them.
if ! { $as_root apt-get -q update \
    && $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y --no-install-recommends install $missing; } >"$log" 2>&1 </dev/null
then
    tail -n 20 "$log" >&2
    echo "Installing packages failed; the lines above are apt-get's last." >&2
    exit 1
fi
