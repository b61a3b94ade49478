"""`python -m deepseek_jax.hf.lm_eval`: the tasks of lm-evaluation-harness."""
