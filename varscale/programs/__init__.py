"""Models as programs: one face for linen modules, nnx modules and plain functions, and how they are traced."""
