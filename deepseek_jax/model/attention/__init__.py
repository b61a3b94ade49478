"""Attention: the normed residual stream goes in, its mixture over earlier tokens comes out.

Read interface.py first: what every kind has. kinds.py chooses one; mla.py and grouped_query.py are
two; causal.py computes whole sequences by blockwise.py or cudnn.py, kv_cache.py is for decoding.
"""
