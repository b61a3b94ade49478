"""The train step, compiled for each shape of batch, ahead and by a thread."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from deepseek_jax.parallel.xla_options import with_known_options
from deepseek_jax.runtime import compile_cache


class Program(NamedTuple):
    """One compiled step."""

    compiled: Any  # jax.stages.Compiled
    seconds: float  # to trace, lower and compile it, or to read it from the cache
    cached: bool  # it came from the persistent cache


class CompiledStep:
    """A train step, compiled for each shape of batch that it is called with. It donates its first argument,
    the state, alone.

    Args:
      step: (state, batch, frozen weights or None) -> (state, metrics).
      mesh: to compile and run on.
      options: of XLA's compiler (parallel/xla_options.py); they win over XLA_FLAGS.
      say: what to do with the line about an option that the compiler does not know.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        mesh: jax.sharding.Mesh,
        options: dict[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._jitted = jax.jit(step, donate_argnums=0)
        self._mesh = mesh
        self._options = options
        self._say = say
        self._programs: dict[Any, Program] = {}
        self._ahead: dict[Any, concurrent.futures.Future] = {}
        self.last: Program | None = None  # the one that ran last
        self.compiling: Callable[[], Any] = (
            contextlib.nullcontext
        )  # a context in which the caller waits for a program

    def compile_ahead(self, state: Any, batch: Any, frozen: Any = None) -> None:
        """Starts to compile for arguments of these shapes, dtypes and shardings, in a thread: XLA compiles a
        program on one core.
        """
        executor = concurrent.futures.ThreadPoolExecutor(1, "compile")
        self._ahead[_key(batch)] = executor.submit(self._compile, state, batch, frozen)
        executor.shutdown(wait=False)

    def _compile(self, state: Any, batch: Any, frozen: Any) -> Program:
        started, hits = time.perf_counter(), compile_cache.hits()
        with jax.set_mesh(self._mesh):  # of this thread
            lowered = self._jitted.lower(state, batch, frozen)
            compiled = with_known_options(
                lambda options: lowered.compile(compiler_options=options), self._options, self._say
            )
        return Program(compiled, time.perf_counter() - started, compile_cache.hits() > hits)

    def program(self, state: Any, batch: Any, frozen: Any = None) -> Program:
        """The program for these arguments, or arguments like them; compiled if there is none yet."""
        key = _key(batch)
        if key not in self._programs:
            ahead = self._ahead.pop(key, None)
            with self.compiling():
                self._programs[key] = (
                    ahead.result() if ahead else self._compile(state, batch, frozen)
                )
        return self._programs[key]

    def __call__(self, state: Any, batch: Any, frozen: Any = None) -> Any:
        self.last = self.program(state, batch, frozen)
        return self.last.compiled(state, batch, frozen)


def _key(batch: Any) -> Any:
    leaves, tree = jax.tree.flatten(batch)
    return tree, tuple((a.shape, a.dtype) for a in leaves)
