"""The threads of XLA's CPU client. Imports nothing: what it sets must be set before JAX makes the client."""

import os


def enough_threads(devices: int) -> None:
    """Sizes the thread pool of XLA's CPU client for so many devices of this process, unless NPROC
    is set already.

    A collective blocks a thread until its partners come, and independent ones run at once. With
    XLA's one thread per device, programs with several mesh axes run out of threads and wait for
    ever for partners that have none. XLA reads the number from NPROC. Call it before JAX makes the
    client.
    """
    os.environ.setdefault("NPROC", str(16 * devices))
