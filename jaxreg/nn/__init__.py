"""Building blocks of networks: Flax modules without geometry."""
