"""Safetensors files and bounded JSON, read and written once for checkpoint/ and hf/.

In: paths, and specs or blocks of arrays. Out: tensors by name, and any region of one as a NumPy array.
Nothing here knows a model, a run or Hugging Face. Read header.py first (the format of one file), then
regions.py (parts of an array in a file) and files.py (tensors over several files).
"""
