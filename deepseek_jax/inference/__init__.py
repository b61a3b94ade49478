"""A model that is not trained here: loaded, asked for logits, for text, and for its quality.

In: a folder with a Hugging Face checkpoint or a run. Out: a LoadedModel. Read loaded.py first (what such a
model can do), then opener.py (what a folder may hold); generation/ writes text with it, evaluation/ and
lm_eval.py measure it.
"""
