"""File systems as far as a conversion needs them: read small files, say where their bytes lie, write to FAT."""
