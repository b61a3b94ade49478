"""Data on the host: from files to the sequences of a step, and chats to token ids. Nothing here
touches a device.

In: `config.data` and a tokenizer. Out: what `open.open_data` opens, whose sequences are a pure function of
(seed, index). Of documents: a `loader.Loader`. Read loader.py first; then sources.py (files to token ids:
documents.py finds them, formats.py, arrow.py and tokenfile.py read them), packing.py (documents to
sequences), order.py and windows.py (which come when). Of examples for fine-tuning: an
`example_loader.ExampleLoader`; then examples.py (rows of records.py to token ids, kept on disk by
example_files.py), example_choice.py (what is trained on, held out, left out) and example_packing.py.
scoring.py makes tokens and a mask of a row: conversations.py reads its format, turns.py finds what the
model says in a rendered chat. tokenizer.py and its neighbours read tokenizers of others, chat.py and
template.py their chat templates.
"""
