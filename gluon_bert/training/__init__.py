"""Steps, losses, and what is told about them. Needs a network and batches, knows of no files but the log."""
