"""Files and command lines of other trainers, turned into a config of ours that trains as theirs would.

In: recipes (YAML, JSON) and command lines. Out: a config file, each line with where it came from; the launch
command; and of every key what became of it. Read in this order:

1. `source.py`: a *source* is a file or the flags of a command line: *entries*, that is dotted keys with
   values and places ("recipe.yaml:12"). `reading.py`, `hydra.py`, `references.py` and `command.py` make them.
2. `tool.py`: a *tool* (Trainer of transformers 5, Accelerate, NeMo 1, ...) recognises its sources, and has a
   table: dotted key or pattern -> handler. `tools/` has one module for each; `registry.py` lists them;
   `handlers.py` has the handlers that most keys need.
3. `migration.py`: a handler gives the verdict on one entry, by calling one of these methods:

   - `tell(entry, name, value)`: what it says. `name` is a *fact* (`facts.py`: "per_device_batch", "epochs")
     or an option of ours by its full name ("optimizer.b1").
   - `no_effect(entry, why)`
   - `refuse(entry, why, repair)`: training would not be theirs. --allow=KEY turns it into "left out on
     request".

   A key that is not in the table is unknown, and is refused as well. What a tool does where its files are
   silent is told by `default(name, value)` in `Tool.finish`.
4. `arithmetic/`: turns the facts, whoever told them, into options: batch, steps, schedule, mesh, checkpoints.
   `Migration.set` records which facts an option follows from.
5. `config_file.py` and `report.py` write what came out; `check.py` validates it for so many devices.

Each entry is in exactly one of three lists: became, has no effect, refused. Where several tell the same
fact, the higher rank wins (`source.Rank`): flags over recipes over Accelerate's files over defaults. Two of
the same rank that differ are refused, as DeepSpeed and transformers do.
"""
