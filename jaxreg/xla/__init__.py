"""XLA: scheduling of computations and the cache of compiled programs."""
