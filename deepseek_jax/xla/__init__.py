"""Compiled programs, read: instructions, collectives, loops."""
