"""Smaller models: experts scored and pruned, layers dropped, experts made narrower.

In: a Hugging Face folder or a run's workdir, and calibration text. Out: a Hugging Face folder with
compression.json, which says what became of every layer and expert (hf/compression_map.py). Read source.py
(arrays of a model, part by part), output.py (the folder) and scores.py first; each subcommand is a module.
"""
