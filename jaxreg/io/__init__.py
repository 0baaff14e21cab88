"""Files of scans, transforms, points and their checks."""
