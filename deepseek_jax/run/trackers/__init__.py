"""Where the rows of a run go besides the terminal.

Read every.py first: all destinations of a run. metrics.jsonl (jsonl.py) and TensorBoard (tensorboard.py) are
written by the training process. W&B, MLflow, Trackio and ClearML are each in a process of their own
(outside.py here, child.py there; one `*_run.py` or `*_task.py` per tool), because their packages hook exits,
signals and stdout, and a call of theirs that hangs can be ended in no other way.

The package itself imports nothing: the other processes begin with it and need no JAX.
"""
