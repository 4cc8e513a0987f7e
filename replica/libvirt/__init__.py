"""Virtual machines under libvirt: its domains, checkpoints and backup jobs, as a change source."""
