"""Compiled programs, read from their text: instructions, loops, collectives, and the part of the
model each belongs to.

In: `compiled.as_text()`. Out: `program.Collective`s, with bytes per step and device. Read
program.py first; hlo.py parses the text, loops.py counts how often an instruction runs, origin.py
finds its part of the model, and replica_groups.py the devices and mesh axes of a collective. work.py
says what an instruction has to do, kernels.py of which kernels it knows.
Nothing here knows configs or models but by their names.
"""
