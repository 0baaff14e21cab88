"""How a model learns: pure step functions, and the loops that call them."""
