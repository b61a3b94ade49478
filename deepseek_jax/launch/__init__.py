"""`python -m deepseek_jax.launch`: several processes on this host, restarted when one fails. Imports no JAX.

In: options and a command. Out: its exit code. launcher.py watches the processes; read it first. options.py reads the command line
and makes environments, child.py is one process and its output, restarts.py decides what happens after a failure.
"""
