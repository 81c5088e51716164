"""The training loop: steps, losses, metrics, callbacks, checkpoints and estimates."""
