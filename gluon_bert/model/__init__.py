"""The network. Axis letters: B batch, T positions, M masked tokens, C units, H heads, V vocabulary."""
