"""Sources of text and their formats."""
