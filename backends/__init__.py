"""Where a planned step is executed: nowhere (`none`), in plain NumPy (`numpy`), or by JAX on a device (`jax`)."""
