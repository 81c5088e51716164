"""Training with several worker processes, on one machine or many."""
