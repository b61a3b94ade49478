"""Arrays over many devices: the mesh, where weights lie on it, how they move, blocks over stages.

A config and logical axis names enter; meshes, shardings and functions inside of `per_device` leave. Read
mesh.py first, then sharding.py and weights.py.
"""
