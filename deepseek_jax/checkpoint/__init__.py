"""Checkpoints of the training state: the only user of Orbax."""
