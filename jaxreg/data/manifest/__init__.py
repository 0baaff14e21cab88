"""Which scans there are, and what is wrong with them."""
