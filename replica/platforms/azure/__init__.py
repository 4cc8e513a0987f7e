"""Recovery on Azure: disks as page blobs, and the template that makes a machine of them."""
