"""Training runs: from a configuration file to trained weights."""
