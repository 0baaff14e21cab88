"""Registration networks, a module each, and their registry."""
