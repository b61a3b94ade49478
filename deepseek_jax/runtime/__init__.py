"""What everything else stands on: the environment before JAX starts, the C library, the compile
cache, JAX's private parts.

jax_private.py holds every use of jax._src, libc.py every call of the C library that Python does not
offer, each with what it waits for. Nothing here imports JAX when it is imported, except
compile_cache.py.
"""
