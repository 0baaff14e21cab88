"""Affine and coarse alignment before a network sees a pair."""
