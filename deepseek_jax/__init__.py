"""deepseek_jax: a JAX/Flax trainer for DeepSeek-family mixture-of-experts language models."""

__version__ = "0.1.0"
