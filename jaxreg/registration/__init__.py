"""Two scans and a model in, a transform in millimetres out."""
