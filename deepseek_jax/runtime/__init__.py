"""What all stand on: the environment, huge pages, the compile cache, JAX's private corners."""
