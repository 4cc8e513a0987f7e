"""Recovery machines as domains of libvirt on this host."""

from replica.platforms.libvirt.platform import LibvirtPlatform

__all__ = ["LibvirtPlatform"]
