"""Where recovery machines run: each platform behind one protocol."""
