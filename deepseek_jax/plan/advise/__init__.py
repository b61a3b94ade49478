"""Which mesh, strategy and memory levers a config should run with: `python -m deepseek_jax.plan advise`."""
