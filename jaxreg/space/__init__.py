"""Geometry: grids, sampling, displacement fields, transforms."""
