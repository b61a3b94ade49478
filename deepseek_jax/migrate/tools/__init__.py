"""Other trainers: one module for each, with its table of keys, its defaults and how its files are recognised."""
