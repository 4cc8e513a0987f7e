"""Generation 2 to 1 and back on disk images: the converter (conversion/) brought together with the formats (vhdx/)."""
