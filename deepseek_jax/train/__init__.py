"""Losses, optimizer, state, the one jitted step and the loop around it."""
