"""jaxreg: universal medical image registration in JAX and Flax."""

__version__ = "0.1.0"
