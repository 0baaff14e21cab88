"""What networks are made of: Flax parts without geometry."""
