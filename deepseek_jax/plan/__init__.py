"""What a run will need and communicate, before it is launched: `python -m deepseek_jax.plan --help`."""
