"""Trained weights: where they come from, and PyTorch's files."""
