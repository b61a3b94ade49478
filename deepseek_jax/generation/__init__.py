"""Text from a model: prefill, decoding with a cache, sampling, speculation, streaming. The commands are generate.py's."""
