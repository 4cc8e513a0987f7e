"""The disk formats: VHDX whole, VHD, raw, and qcow2 through qemu-img. Knows nothing of replication."""
