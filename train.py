"""Train a DeepSeek-family mixture-of-experts model.

  python train.py --config=configs/tiny.py --workdir=runs/tiny
  python train.py --config=configs/v3.py --workdir=DIR --config.mesh.expert=8 --config.optimizer.learning_rate=1e-4

The config is a Python file; any option can be overridden as --config.section.key=value (all options, with their units,
are in deepseek_jax/config/options.py; --config=FILE.py --print_config shows them resolved). The same command run again resumes
from the newest checkpoint in the workdir. Several processes: python -m deepseek_jax.launch --nproc_per_node=2 train.py ...
starts them; under SLURM, Open MPI, Kubernetes and torchrun they find each other; elsewhere run the same command on each host
with --coordinator_address, --num_processes and --process_id.

Exit codes: 0 done; 1 an error; 2 a mistake in the options, data or workdir, said in one line before anything is compiled; 3 stopped
after too many non-finite updates; 4 another process was lost; 5 the last checkpoint could not be written, in five tries (those before
it are whole, and the same command goes on from there); 6 a step did not end (config.watchdog); 128 + N
stopped by signal N after a checkpoint: 129 SIGHUP, 130 SIGINT, 138 SIGUSR1, 140 SIGUSR2, 143 SIGTERM (several
processes: by a signal to any of them; one that is ignored, as nohup ignores SIGHUP, stops nothing). A second
SIGINT or SIGTERM ends at once, with the same code.
"""

from deepseek_jax.cli import terminal
from deepseek_jax.cluster.signals import Stopper
from deepseek_jax.runtime import environment
from deepseek_jax.runtime.huge_pages import use_huge_pages

stopper = Stopper("train.py")
if __name__ == "__main__":  # before all else
    use_huge_pages()  # it starts the program again
    terminal.set_up("log")
    stopper.install()  # a signal during the imports below ends in one line too

import contextlib
import json
import sys
import time

import jax

from deepseek_jax import generate, objectives
from deepseek_jax.checkpoint.checkpoint import Checkpointer, SaveFailed
from deepseek_jax.cluster import gpus
from deepseek_jax.cluster.processes import Cluster
from deepseek_jax.data import contents
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.tokenizer import load_tokenizer
from deepseek_jax.errors import UserError, one_line
from deepseek_jax.model.count import count
from deepseek_jax.parallel import xla_options
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.run import commandline, init_from, lock, loop, resume, summary
from deepseek_jax.run.profile import Profiler
from deepseek_jax.run.watchdog import Watchdog, end_alone
from deepseek_jax.runtime import compile_cache
from deepseek_jax.train import workdir
from deepseek_jax.train.batch import abstract_batch
from deepseek_jax.train.compiled_step import CompiledStep
from deepseek_jax.train.state import TrainState, init_state, make_layout, to_tree
from deepseek_jax.train.step import make_eval_step, make_train_step


def main(argv: list[str]) -> int:
    environment.check()
    cluster = commandline.find_cluster(argv)
    with (
        contextlib.ExitStack() as held,
        cluster.failures(loop.BadNumbers, SaveFailed),
        cluster.mistakes(),
        environment.mistakes(),
    ):
        held.callback(cluster.close)
        return train(argv, cluster, held)


def train(argv: list[str], cluster: Cluster, held: contextlib.ExitStack) -> int:
    started = time.perf_counter()
    flags = commandline.parse(argv)
    if flags.help:
        print(f"{__doc__}\n{commandline.help_text(flags)}")
        return 0
    config = commandline.read_config(flags, argv)
    if flags.print_config:
        print(json.dumps(config.to_json(), indent=2))
        return 0
    if not flags.workdir:
        raise UserError(
            "--workdir is missing. Name the folder of this run, for instance --workdir=runs/tiny."
        )
    gpus.take_memory(cluster.together)
    cluster.join(commandline.options(config, flags), config.watchdog.heartbeat_timeout, stopper)
    say = print if cluster.index == 0 else lambda text: None

    # Everything that can be wrong is found out here, before anything is compiled.
    mesh = make_mesh(config)
    tokenizer = load_tokenizer(config.data.tokenizer, special_tokens=config.data.special_tokens)
    generate.check_prompt(config.eval.sample_prompt, "config.eval.sample_prompt", tokenizer, config)
    changed = workdir.prepare(flags.workdir, config, tokenizer.name)
    if cluster.index == 0:
        held.enter_context(lock.all_locked(flags.workdir, config))
    objective = objectives.make(config)
    loader = Loader(config, tokenizer, progress=cluster.index == 0, fields=objective.fields)
    source = init_from.open_for_training(config, flags.workdir) if config.init_from else None
    digest = contents.digest(loader.contents)
    cluster.agree(
        "data files", {"what config.data reads": f"{loader.description}, sha256 {digest[:12]}"}
    )

    checkpoints = Checkpointer(
        workdir.checkpoints(flags.workdir, config), options=config.checkpoint
    )
    compile_cache.use_cache(config.compile.cache_dir, warn=say)
    with (
        jax.set_mesh(mesh),
        contextlib.closing(checkpoints),
        cluster.failures(loop.BadNumbers, SaveFailed),
    ):
        layout = make_layout(config, mesh, objective.frozen(mesh))
        platform = mesh.devices.flat[0].platform
        compiler_options = xla_options.xla_options(
            config, platform, xla_options.bytes_of_a_layer(config, layout.abstract.params, mesh)
        )
        sizes = count(config.model, layout.abstract.params, config.train.sequence_length)
        wanted = to_tree(layout.abstract_sharded())
        resume_step = checkpoints.newest_good(wanted)
        cluster.agree(
            "folder, one that all hosts see", {"the newest checkpoint in --workdir": resume_step}
        )
        going_on = resume.GoingOn(checkpoints, flags.workdir, config, loader.contents)
        progress = going_on.progress(resume_step)
        summary.show(
            config,
            mesh,
            layout,
            sizes,
            loader,
            flags.workdir,
            resume_step,
            changed,
            compiler_options,
            progress.history,
        )

        train_step = CompiledStep(
            make_train_step(config, layout, objective), mesh, compiler_options, say
        )
        if (resume_step or 0) < config.train.steps:
            train_step.compile_ahead(
                layout.abstract_sharded(),
                abstract_batch(objective.fields, config, mesh, resume_step or 0),
                layout.abstract_frozen(),
            )
        frozen = layout.frozen.load() if layout.frozen else None

        def restored(step: int | None) -> tuple[TrainState, loop.Progress]:
            if step is None:
                fresh = (
                    init_from.initial_state(source, config, layout, flags.workdir)
                    if config.init_from
                    else init_state(config, layout)
                )
                return fresh, going_on.progress(step)
            state, _ = resume.restore(checkpoints, layout)
            return state, going_on.progress(int(state.step))

        state, progress = restored(resume_step)
        if int(state.step) >= config.train.steps:
            say(
                f"Step {int(state.step)} of {config.train.steps} is done already. To go on, raise config.train.steps."
            )
            return 0

        workdir.write_config(
            flags.workdir, config, compiler_options, progress.run, progress.history.to_json()
        )
        evaluate = loop.Evaluator(
            config, mesh, loader, make_eval_step(layout, objective), objective, frozen
        )
        profiler = Profiler(config, flags.workdir, train_step) if config.profile.start else None
        # Collectives wait 30 s for each other to begin (gloo's limit), and programs may take some processes longer to compile.
        train_step.program(
            state, abstract_batch(objective.fields, config, mesh, int(state.step)), frozen
        )
        cluster.agree("command", {"steps done": int(state.step)})
        watchdog = Watchdog(
            config.watchdog.step_timeout, cluster.monitor.hung if cluster.monitor else end_alone
        )
        train_step.compiling = watchdog.paused
        result = loop.run(
            config,
            flags.workdir,
            mesh,
            state,
            train_step,
            evaluate,
            loader,
            checkpoints,
            sizes,
            progress,
            profiler,
            lambda: summary.first_step(train_step, time.perf_counter() - started),
            lambda: restored(checkpoints.newest_good(wanted)),
            stopper,
            watchdog,
            frozen,
        )

        if result.stopped_by is not None:
            say(
                f"Stopped by signal {result.stopped_by} after step {result.step}, saved in {checkpoints.path(result.step)}. "
                f"The same command goes on from there."
            )
            return 128 + result.stopped_by
        sample = ""
        if config.eval.sample_prompt and config.eval.sample_tokens:
            sample = generate.sample(
                layout.model,
                result.state.params,
                result.state.bias,
                tokenizer,
                mesh,
                config.eval.sample_prompt,
                config.eval.sample_tokens,
                temperature=0.7,
                top_p=0.95,
                seed=config.seed,
            )
        summary.show_end(
            flags.workdir,
            result,
            checkpoints.path(result.step),
            sample,
            time.perf_counter() - started,
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv))
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except loop.BadNumbers as error:  # in every process after the same step
        if jax.process_index() == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(3)
    except SaveFailed as error:  # in every process
        if jax.process_index() == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(5)
    except OSError as error:
        print(f"train.py: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
