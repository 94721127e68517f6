"""Pretrain, fit selectors, fine-tune and evaluate, as a configuration says.

    python -m tosa_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]
        [--extend] [--branch_from=OTHER_DIR/checkpoints/STAGE/STEP]
        [--multihost [--coordinator=HOST:PORT --num_processes=N --process_id=I] [--join_timeout=SECONDS]]

Start the same command again to continue a run that was stopped. DIR may be in a bucket: gs://BUCKET/PATH. To train one
model in several processes, start the command with --multihost once in each of them; if they cannot all join, none
trains. On Cloud TPU, Slurm and Open MPI they find each other without --coordinator. --extend lets a run go on whose
last stage has more epochs or steps now, a finished one too. --branch_from begins a new work directory with a checkpoint
of another run and its optimizer. Exit status: 0 done, 1 another process failed, 2 bad input, 128 + the signal's number
after SIGTERM (143), SIGINT (130), SIGHUP (129) or SIGUSR1 (138), each after a checkpoint was written.
"""

import sys

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, end_with, run_command
from tosa_jax.distributed.initialisation import join
from tosa_jax.distributed.messages import say
from tosa_jax.distributed.preemption import Stopped, signals_stop_at_once
from tosa_jax.paths import AnyPath


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    try:
        with signals_stop_at_once():
            cluster, rest = flags.parse_cluster(argv)
            begin, rest = flags.parse_begin(rest)
            config, workdir = flags.parse(__doc__, rest)
            configure_jax()
            join(cluster)
            _train(config, workdir, begin)
    except Stopped as stopped:
        say(f"{stopped}; start the same command again to go on")
        return 128 + stopped.signum
    return 0


def _train(config, workdir: AnyPath, begin: flags.Begin) -> None:
    # Imported late: mistakes in the command line are reported without this delay.
    from tosa_jax.config import make_run_config, process_differences, to_json
    from tosa_jax.distributed import coordination
    from tosa_jax.reporting import report
    from tosa_jax.train.runner import run_stages
    from tosa_jax.train.workdir import open_workdir

    run = make_run_config(config)
    coordination.check_same(coordination.code_versions())
    coordination.check_same({"workdir": str(workdir)} | to_json(run), process_differences)
    with open_workdir(workdir, run, extend=begin.extend, branch_from=begin.branch_from):
        table = report.format_table(run_stages(run, workdir))
        if coordination.is_main():
            say(table, sys.stdout)
            say(
                f"\nreport, metrics and checkpoints: {workdir}",
                sys.stdout,
            )


if __name__ == "__main__":
    end_with(main())
