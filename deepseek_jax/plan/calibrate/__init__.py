"""How fast the devices of this machine are, measured: `python -m deepseek_jax.plan calibrate --help`.

In: devices. Out: rates (plan/rates.py) in a JSON file that `plan --rates=FILE.json` reads. Read measure.py
first; probes.py and links.py hold what is timed, timing.py how, file.py what is kept.
"""
