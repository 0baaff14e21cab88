"""From labelled pairs to tables of overlap, distance and folding."""
