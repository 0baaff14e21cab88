"""How wrong a transform is: pure, differentiable."""
