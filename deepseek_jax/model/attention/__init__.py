"""Attention: what a layer projects, attends over and keeps in a cache."""
