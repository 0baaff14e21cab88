"""How a pair becomes a transform."""
