"""Reading disks over the NBD protocol: what goes over the wire, a connection, and a disk behind several of them."""
