"""Instance optimisation of one pair's transform."""
