"""Perplexity and multiple choice.

In: a loaded model, and text or questions. Out: figures with their standard errors. Read scorer.py first: it
gives the log-likelihood of each span of tokens, on which perplexity.py and choices.py stand.
"""
