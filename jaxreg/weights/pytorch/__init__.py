"""Published PyTorch weights to Flax variables and back."""
