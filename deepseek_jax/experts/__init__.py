"""How tokens meet experts: on one device, tokens and choices go in, weighted outputs come out.

Read dispatch.py first: the methods; then sorted_rows.py: a device that has all experts, and rounds.py: the
others, in bounded memory. What an expert computes is swiglu.py, on products of rows and matrices by
cpu_grouped_matmul.py on CPUs, by grouped_matmul.py and its kernels on GPUs, or batched over places
(places.py); implementations.py chooses. cpu_unstacked.py is for decoding.
"""
