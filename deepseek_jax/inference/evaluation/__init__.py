"""Perplexity and multiple choice."""
