"""Checkpoints that two processes write together: damaged or unwritable at one of them, read by fewer."""

import os
import subprocess
import sys
import textwrap

from deepseek_jax.cluster.ports import free_port
from tests.support import ROOT
from tests.support.checkpoints import KINDS, assert_same_bits, read, values

REPOSITORY = ROOT

PROGRAM = """
    import errno, faulthandler, os, sys
    faulthandler.dump_traceback_later(100, exit=True)
    sys.path[:0] = [os.path.join(os.getcwd(), "tests")]
    import jax
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    me, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    jax.distributed.initialize(address, 2, me)
    import numpy as np
    from deepseek_jax.checkpoint import manifest
    from deepseek_jax.checkpoint.checkpoint import Checkpointer
    from deepseek_jax.cluster.exchange import exchange
    from deepseek_jax.config.options import CheckpointConfig as Checkpoint
    from tests.support.checkpoints import SPECS, abstract, explicit_mesh, values
    mesh = explicit_mesh(2, 4)

    def put(tree):
        def place(a, spec):
            sharding = jax.NamedSharding(mesh, spec)
            return jax.make_array_from_callback(np.shape(a), sharding, lambda i: np.asarray(a)[i])

        return jax.tree.map(place, tree, SPECS)

    def options(kind):
        return Checkpoint(kind=kind, keep=0, local_dir=f"{folder}/{kind}/local" if kind == "local" else "")

    def opened(kind, said):
        return Checkpointer(f"{folder}/{kind}/checkpoints", options=options(kind), warn=said.append)

    def check(state, step):
        for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(values(step)), strict=True):
            for shard in got.addressable_shards:
                wanted = np.ascontiguousarray(np.asarray(want)[shard.index])
                assert np.asarray(shard.data).tobytes() == wanted.tobytes()

    def restore(kind, said):
        state, extra = opened(kind, said).restore(abstract(values(), mesh))
        check(state, extra["at"])
        return extra["at"]

    def own(kind):
        if kind != "local":
            return f"{folder}/{kind}/checkpoints"
        return f"{folder}/local/local/{open(f'{folder}/local/checkpoints/run_id').read()}/process_{me:05d}"

    with jax.set_mesh(mesh):
        for kind in ("sharded", "full", "local"):
            said = []
            c = opened(kind, said)
            for step in (1, 2):
                c.save(step, put(values(step)), {"at": step})
            c.wait()
            assert not said, said
            honest = manifest.checksums
            if me == 1:  # the disk of one process is full
                def fails(*a, **k):
                    raise OSError(errno.ENOSPC, "No space left on device")
                manifest.checksums = fails
            c.save(3, put(values(3)), {"at": 3})
            c.wait()
            manifest.checksums = honest
            exchange("test", "")  # process 0 cleans up
            names = sorted(n for n in os.listdir(own(kind)) if n != "run_id")
            assert names == ["1", "2"], names
            exchange("test", "")
            if me == 0:
                assert len(said) == 1 and "process 1: No space left" in said[0], said
            c.save(3, put(values(3)), {"at": 3})
            c.close()
            said.clear()
            assert restore(kind, said) == 3 and not said
            # One process, and only it, damages its newest; of a shared folder, any file.
            if me == 1:
                top = f"{own(kind)}/3"
                name = max(manifest.read(top).files)
                os.truncate(f"{top}/{name}", os.path.getsize(f"{top}/{name}") - 1)
            exchange("test", "")
            assert restore(kind, said) == 2
            if me == 0:
                assert len(said) == 1 and "kept aside" in said[0], said
            c = opened(kind, said)
            # Of kind local the other process has its part of step 3 still, which nobody can use.
            c.save(3, put(values(3)), {"at": 3})
            c.close()
    print("done", flush=True)
"""


def test_two_processes_and_then_one(tmp_path):
    """The one that reads what two wrote is this one."""
    address = f"127.0.0.1:{free_port()}"
    env = os.environ | {"PYTHONPATH": str(REPOSITORY), "no_proxy": "127.0.0.1"}
    program = textwrap.dedent(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i), address, str(tmp_path)],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [p.communicate(timeout=280)[0] for p in processes]
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0 and "done" in text, "\n".join(said)[-6000:]
    for kind in KINDS:
        state, at = read(tmp_path / kind, kind)
        assert at == 3
        assert_same_bits(state, values(3))
