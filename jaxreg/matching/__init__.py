"""Corresponding places of two scans, by descriptors."""
