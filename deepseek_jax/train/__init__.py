"""The training step: an objective, a batch and a state in, the next state and what is reported out.

Read step.py first (forward, loss, gradients, clip, update, balance), then gradients.py and state.py.
"""
