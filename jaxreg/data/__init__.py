"""What the network sees: preprocessing and pairs, on the host."""
