"""Host-side data: tokenizer, sources, packing and the loader. NumPy and grain only; nothing here touches a device."""
