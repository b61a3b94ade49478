"""What a run will need and communicate, before it is launched: `python -m deepseek_jax.plan --help`.

In: a config and a number of devices, which need not be here. Out: a report, as text or JSON. Read
__main__.py first; topology.py makes the devices and compiles the step for them, report.py says what
that means, exchange.py sizes the dispatch's buffers. roofline.py predicts its time.
"""
