"""The network. Axis letters: B batch, T positions, M predictions, C units, H heads, V vocabulary."""
