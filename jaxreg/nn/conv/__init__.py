"""3D convolutions and their fast forms on CPUs."""
