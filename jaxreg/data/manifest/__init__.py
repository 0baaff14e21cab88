"""Manifests of scans: records, readers and checks."""
