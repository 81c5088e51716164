"""A pretrained network in the forms that others run: written, read back and compared with the original."""
