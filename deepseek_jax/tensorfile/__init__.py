"""Safetensors files and bounded JSON, read and written once for checkpoint/ and hf/."""
