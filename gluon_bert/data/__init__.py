"""Text to batches: documents -> pairs -> masked examples -> Batch. Needs no MXNet."""
