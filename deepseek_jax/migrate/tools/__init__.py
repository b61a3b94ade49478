"""Other trainers: one module for each, with its keys, its defaults and how its files are recognised."""
