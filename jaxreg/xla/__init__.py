"""XLA: scheduling, and the caches of lowered and of compiled programs."""
