"""Export of a network for other programs: written, read back and compared with the original."""
