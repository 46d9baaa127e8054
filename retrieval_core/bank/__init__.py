"""References as tokens, and the keys and values that a picture attends to."""
