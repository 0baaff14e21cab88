"""What XLA is told besides the arithmetic."""
