"""Differentiable losses: similarity, regularity, overlap, their weighted sum."""
