"""A cached teacher: what a teacher says of every token of a run's data, made once and read in training.

`python -m deepseek_jax.distill cache` writes it, a run with config.distill.cache reads it. Read manifest.py
first (what a cache is and what it is of), then shards.py (its bytes), maker.py and reader.py.
"""
