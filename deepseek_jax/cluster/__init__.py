"""The processes of a job: which there are, what they agree on, and how they notice that one is lost.

In: the flags and the environment of a process. Out: a `processes.Cluster`. Alone it does nothing;
among other processes it ends all with one line where they disagree, starts JAX on them and watches
them.

Read processes.py first; then discovery.py (which processes there are), agreement.py (before JAX
starts), monitor.py and common_stop.py (while it runs), and wire.py, by which both talk. exchange.py
carries texts over JAX's own service, for checkpoints. gpus.py and signals.py stand alone: the
launcher uses them too.
"""
