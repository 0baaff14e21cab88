"""Trained weights: published models, downloads, checkpoints, PyTorch's files."""
