"""Whether kernels of an experimental part of JAX can be had, and work on the GPUs that are here."""

import concurrent.futures
import importlib
from collections.abc import Callable

import jax


def trouble(module: str, trial: Callable[[], str | None]) -> str | None:
    """Why kernels do not work here, or None; where no GPU is, nothing is tried.

    Args:
      module: of the kernels: what it imports may be missing from this JAX.
      trial: runs each once; None, or what is wrong with its numbers.
    """
    try:
        importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} has not what it is made of ({error})"
    if jax.default_backend() != "gpu":
        return None
    # In a thread: it knows nothing of the mesh and the trace in which somebody asks.
    with concurrent.futures.ThreadPoolExecutor(1, "kernels") as executor:
        try:
            return executor.submit(trial).result()
        except Exception as error:  # whatever JAX, XLA, the compilers and the driver refuse it with
            said = (str(error).splitlines() or [""])[0][:200]
            return f"a first call fails ({type(error).__name__}: {said})"
