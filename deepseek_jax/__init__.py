"""A trainer for DeepSeek-family mixture-of-experts language models in JAX and Flax."""

from deepseek_jax.runtime import environment, moved_names

__version__ = "0.1.0"

environment.prepare()
moved_names.install()
