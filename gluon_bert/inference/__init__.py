"""Predictions of a trained network: vectors, filled masks, scores."""
