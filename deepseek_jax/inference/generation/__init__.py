"""Answers to prompts: a placed model and token ids go in, tokens come out as they are chosen.

Read engine.py first: the loop. programs.py is what it runs on devices, speculative.py the drafts of
multi-token prediction, layer_weights.py how decoding holds the weights. sample.py is apart: a few
tokens of a model in training, without a cache.
"""
