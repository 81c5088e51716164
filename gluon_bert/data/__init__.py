"""Text to batches: documents -> pairs -> masked examples -> Batch. Only `batch` knows MXNet."""
