"""The keys of all objects in a store (docs/format.md, section 1): built here and nowhere else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import quote, unquote

from replica.errors import IntegrityError, UsageError

STORE = "godwit.json"
LONGEST_NAME_BYTES = 200
LARGEST_POINT = 10**20 - 1
LARGEST_EPOCH = 2**32 - 1
LARGEST_ORDINAL = 10**6 - 1
LARGEST_DIGEST = 9999

# What points need, and what leads to them, as patterns of whole keys: written once, and locked where a store locks.
LASTING = (
    STORE,
    "tenants/*/keys/*.json",
    "tenants/*/names/*.json",
    "tenants/*/vms/*/vm.json",
    "tenants/*/vms/*/settings/*.json",
    "tenants/*/vms/*/manifests/*.json",
    "tenants/*/vms/*/maps/*",
    "tenants/*/vms/*/segments/*",
    "tenants/*/vms/*/conversions/*",
)
# What agents write of that; making a store and its keys is left to whoever has all rights.
ADDED_BY_AGENTS = LASTING[2:]
LEASES = "tenants/*/vms/*/lease.json"
PINS = "tenants/*/vms/*/pins/*.json"
HOLDS = "tenants/*/vms/*/holds/*.json"
CONDEMNED = "tenants/*/vms/*/condemned/*.json"
EVENTS = "tenants/*/vms/*/events/*.json"
HISTORIES = "tenants/*/vms/*/history/*.json"
DIGESTS = "tenants/*/fleet/digests/*"
CHANGES = "tenants/*/fleet/changes/*.json"
REPLACED = (LEASES, DIGESTS)  # by compare-and-swap; all else is written once
PLAN_RUNS = "tenants/*/plans/*.runs/*.json"
PLAN_JOURNALS = "tenants/*/plans/*.journal/*.json"
TENANTS = "tenants/"

_TENANT = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_VM_ID = re.compile(r"[0-9a-f]{32}")
_OF_VM = re.compile(r"tenants/([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)/vms/([0-9a-f]{32})/.+")
_DIGEST = re.compile(r"tenants/[^/]+/fleet/digests/([0-9a-f]{32})-(\d{4})")
_PART = re.compile(r".*/(\d{20})/(\d{10})-(\d{6})")


@dataclass(frozen=True, slots=True, order=True)
class PartId:
    """What tells a segment or a map part from every other of its VM: the cycle that wrote it and its place there."""

    point: int
    epoch: int
    ordinal: int


def encode_name(name: str) -> str:
    """Return a VM's name as one key part. Raises UsageError for a name that cannot be one."""
    if not name or name != name.strip() or any(ord(c) < 32 or ord(c) == 127 for c in name):
        raise UsageError(
            f"{name!r} cannot be a VM's name", hint="use printable characters, with no space before or after"
        )
    try:
        encoded = quote(name, safe="").replace(".", "%2E").replace("~", "%7E")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name!r} cannot be a VM's name: it is not valid Unicode") from error
    if len(encoded) > LONGEST_NAME_BYTES:
        raise UsageError("the VM's name is too long", hint=f"{LONGEST_NAME_BYTES} ASCII letters fit, fewer of others")
    return encoded


def check_tenant(tenant: str) -> str:
    """Return ``tenant`` if it may be one. Raises UsageError."""
    if not _TENANT.fullmatch(tenant):
        raise UsageError(
            f"{tenant!r} cannot be a tenant", hint="use 1 to 63 lower-case letters, digits and inner hyphens"
        )
    return tenant


def is_tenant(text: str) -> bool:
    """Whether it may be a tenant."""
    return _TENANT.fullmatch(text) is not None


def names_prefix(tenant: str) -> str:
    """Return the prefix of the tenant's VM names."""
    return f"tenants/{check_tenant(tenant)}/names/"


def name(tenant: str, vm_name: str) -> str:
    """Return the key of the object that leads from a VM's name to its id."""
    return f"{names_prefix(tenant)}{encode_name(vm_name)}.json"


def name_of(key: str) -> str:
    """Return the VM's name that a name object's key spells."""
    return unquote(key.rsplit("/", 1)[-1].removesuffix(".json"))


def tenant_keys(tenant: str) -> str:
    """Return the prefix of the tenant's encryption keys."""
    return f"tenants/{check_tenant(tenant)}/keys/"


def tenant_key(tenant: str, number: int) -> str:
    """Return the key of the object that holds one version of the tenant's encryption key, wrapped."""
    return f"{tenant_keys(tenant)}{number:020}.json"


def plans(tenant: str) -> str:
    """Return the prefix of what the runs of all the tenant's plans leave."""
    return f"tenants/{check_tenant(tenant)}/plans/"


@dataclass(frozen=True, slots=True)
class PlanKeys:
    """The keys of what the runs of one recovery plan leave. ``plan`` is written as a tenant is."""

    tenant: str
    plan: str

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if not _TENANT.fullmatch(self.plan):
            raise UsageError(
                f"{self.plan!r} cannot be a plan's name", hint="use 1 to 63 lower-case letters, digits, inner hyphens"
            )

    @property
    def runs(self) -> str:
        """The prefix of all runs."""
        return f"tenants/{self.tenant}/plans/{self.plan}.runs/"

    def run(self, number: int) -> str:
        """How one run was begun."""
        return f"{self.runs}{number:020}.json"

    def journal(self, run: int) -> str:
        """The prefix of all entries of a run's journal."""
        return f"tenants/{self.tenant}/plans/{self.plan}.journal/{run:020}/"

    def entry(self, run: int, number: int) -> str:
        """One entry of a run's journal."""
        return f"{self.journal(run)}{number:010}.json"


def digests(tenant: str) -> str:
    """Return the prefix of the tenant's digests."""
    return f"tenants/{check_tenant(tenant)}/fleet/digests/"


def digest(tenant: str, host_id: str, number: int) -> str:
    """Return the key of one digest of a machine. Raises UsageError for what is no machine's id."""
    if not _VM_ID.fullmatch(host_id) or not 0 <= number <= LARGEST_DIGEST:
        raise UsageError(f"{host_id!r} is no id of a machine", hint="delete host-id in the state folder")
    return f"{digests(tenant)}{host_id}-{number:04}"


def digest_of(key: str) -> tuple[str, int] | None:
    """Return the machine's id and the number in a digest's key, or None where the key is of another kind."""
    match = _DIGEST.fullmatch(key)
    return (match[1], int(match[2])) if match else None


def changes(tenant: str) -> str:
    """Return the prefix of the marks that VMs of the tenant were changed."""
    return f"tenants/{check_tenant(tenant)}/fleet/changes/"


@dataclass(frozen=True, slots=True)
class VmKeys:
    """The keys of one VM's objects."""

    tenant: str
    vm_id: str

    def __post_init__(self) -> None:
        check_tenant(self.tenant)
        if not _VM_ID.fullmatch(self.vm_id):
            raise IntegrityError(f"{self.vm_id!r} is no VM id", hint="the name object that holds it is damaged")

    @property
    def prefix(self) -> str:
        """The prefix of all of them."""
        return f"tenants/{self.tenant}/vms/{self.vm_id}/"

    @property
    def vm(self) -> str:
        """What never changes about the VM."""
        return f"{self.prefix}vm.json"

    @property
    def lease(self) -> str:
        """The right to write."""
        return f"{self.prefix}lease.json"

    def settings(self, version: int) -> str:
        """One version of the protection settings."""
        return f"{self.prefix}settings/{version:020}.json"

    @property
    def manifests(self) -> str:
        """The prefix of all manifests."""
        return f"{self.prefix}manifests/"

    def manifest(self, point: int) -> str:
        """The manifest of a point number."""
        return f"{self.manifests}{point:020}.json"

    @property
    def pins(self) -> str:
        """The prefix of all pins."""
        return f"{self.prefix}pins/"

    def pin(self, point: int) -> str:
        """What keeps a recovery point whatever the retention rule says."""
        return f"{self.pins}{point:020}.json"

    @property
    def holds(self) -> str:
        """The prefix of all holds."""
        return f"{self.prefix}holds/"

    def hold(self, point: int, holder_id: str) -> str:
        """What keeps a recovery point while the VM ``holder_id`` is being seeded from it."""
        return f"{self.holds}{point:020}-{VmKeys(self.tenant, holder_id).vm_id}.json"

    @property
    def condemned(self) -> str:
        """The prefix of the lists of objects that are to be deleted."""
        return f"{self.prefix}condemned/"

    @property
    def events(self) -> str:
        """The prefix of all events of the journal."""
        return f"{self.prefix}events/"

    @property
    def histories(self) -> str:
        """The prefix of what is remembered of points that were removed."""
        return f"{self.prefix}history/"

    def condemned_list(self, number: int) -> str:
        """One list of objects that are to be deleted."""
        return f"{self.condemned}{number:020}.json"

    @property
    def maps(self) -> str:
        """The prefix of all map parts."""
        return f"{self.prefix}maps/"

    def map_part(self, part: PartId) -> str:
        """A map part."""
        return f"{self.maps}{_part(part)}"

    @property
    def segments(self) -> str:
        """The prefix of all segments."""
        return f"{self.prefix}segments/"

    def conversion(self, point: int, disk: int) -> str:
        """What a disk of a point was converted to another generation by."""
        return f"{self.prefix}conversions/{point:020}-{disk:05}"

    def segments_after(self, point: int) -> str:
        """A key that sorts after every segment of ``point`` and of those before it, and before all later ones."""
        return f"{self.segments}{point:020}/~"

    def segment(self, part: PartId) -> str:
        """A segment."""
        return f"{self.segments}{_part(part)}"


def is_lasting(key: str) -> bool:
    """Whether points need the object, so that it must not be deleted nor changed while they stay."""
    return any(fnmatchcase(key, pattern) for pattern in LASTING)


def vm_of(key: str) -> VmKeys | None:
    """Return the keys of the VM that the object belongs to, or None where it belongs to none."""
    match = _OF_VM.fullmatch(key)
    return VmKeys(match[1], match[2]) if match else None


def _part(part: PartId) -> str:
    return f"{part.point:020}/{part.epoch:010}-{part.ordinal:06}"


def part_of(key: str) -> PartId | None:
    """Return what a segment's or map part's key says of it, or None where the key is of another kind."""
    match = _PART.fullmatch(key)
    return PartId(*map(int, match.groups())) if match else None


def point_of(key: str) -> int | None:
    """Return the number in a manifest's, pin's or condemned list's key, or None where the key is of another kind."""
    stem = key.rsplit("/", 1)[-1].removesuffix(".json")
    return int(stem) if len(stem) == 20 and stem.isdigit() else None
