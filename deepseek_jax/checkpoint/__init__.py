"""Checkpoints of the training state: written, found, checked and restored. The only user of Orbax.

In: a tree of sharded arrays and a JSON object. Out: WORKDIR/checkpoints/STEP/, and the same arrays on any
mesh. Read checkpoint.py first (what a run calls), then kind.py (what a kind of files can do) and saver.py
(one save, in order).
"""
