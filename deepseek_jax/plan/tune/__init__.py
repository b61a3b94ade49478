"""The guides' exercises as commands, run for real on the devices present: `python -m deepseek_jax.plan tune
--help`.

In: a config and devices. Out: tables of memory and step time, with the command line of what is best. Read
command.py first; exercises.py says which rows an exercise has, steps.py runs one.
"""
