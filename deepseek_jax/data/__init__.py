"""Data on the host: from files to the sequences of a step, and chats to token ids. Nothing here
touches a device.

In: `config.data` and a tokenizer. Out: a `loader.Loader`, whose sequences are a pure function of
(seed, index). Read loader.py first; then sources.py (files to token ids: documents.py finds them,
formats.py, arrow.py and tokenfile.py read them), packing.py (documents to sequences), order.py and
windows.py (which come when). tokenizer.py and its neighbours read tokenizers of others, chat.py and
template.py their chat templates. scoring.py makes tokens and a mask of a row of fine-tuning data:
conversations.py reads its format, turns.py finds what the model says in a rendered chat.
"""
