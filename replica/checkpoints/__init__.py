"""Checkpoints: what is known of the chains that they make of a VM's disks, and merging what nobody needs."""
