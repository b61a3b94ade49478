"""`python -m deepseek_jax.launch`: several processes on this host."""
