"""How tokens meet experts: on one device, tokens and choices go in, weighted outputs come out.

Read dispatch.py first: the methods; then rounds.py: dispatch, experts and combine in bounded memory. On CPUs
cpu_grouped_matmul.py needs no rounds, and cpu_unstacked.py is for decoding.
"""
