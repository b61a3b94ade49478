"""`python -m deepseek_jax.launch`: several processes on this host, started again when one fails.
Imports no JAX.

In: options and a command. Out: its exit code. Read launcher.py first, which watches the processes;
options.py reads the command line and makes environments, child.py is one process and its output,
restarts.py decides what a failure means. template/ writes files that start a run on a cluster.
"""
