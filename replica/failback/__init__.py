"""Coming home: what differs between the home disks and the newest point, laid over them, verified, swapped in."""
