"""Expert-specialised fine-tuning (ESFT, arXiv:2407.01906): which experts a task uses.

In: a model and a task's data. Out: the table of experts that `config.esft.experts` trains. Read scores.py
first; the table and its file are train/expert_table.py, training is train/some_experts.py.
"""
