"""3D convolutions, with the form that is fast per platform."""
