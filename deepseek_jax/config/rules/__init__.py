"""Rules between options, by topic: each module has a `check(config)` that validation.py calls."""
