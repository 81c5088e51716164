"""Weights of other packages to runs and back, number for number. Trains nothing, downloads nothing."""
