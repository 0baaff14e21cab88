"""PyTorch files of weights, a module for each architecture's tensors."""
