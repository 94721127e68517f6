"""Pretrain, fit selectors, fine-tune and evaluate, as a configuration says.

    python -m tosa_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]
        [--multihost [--coordinator=HOST:PORT --num_processes=N --process_id=I] [--join_timeout=SECONDS]]

Start the same command again to go on where a run stopped. DIR may be in a bucket, gs://BUCKET/PATH. With --multihost,
started once in each process, all of them train one network or none does; on Cloud TPU, Slurm and Open MPI they find
each other. Exit status: 0 done, 1 another process failed, 2 bad input, 130 or 143 stopped by a signal after a
checkpoint.
"""

import sys

from tosa_jax.cli import flags
from tosa_jax.paths import AnyPath


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return flags.run(__doc__, argv, _train, several_processes=True)


def _train(config, workdir: AnyPath) -> None:
    # Imported late, so that a wrong command line is told at once.
    from tosa_jax.config import make_run_config, process_differences, to_json
    from tosa_jax.distributed import coordination
    from tosa_jax.reporting import report
    from tosa_jax.train.runner import run_stages
    from tosa_jax.train.workdir import open_workdir

    run = make_run_config(config)
    coordination.check_same(coordination.code_versions())
    coordination.check_same({"workdir": str(workdir)} | to_json(run), process_differences)
    with open_workdir(workdir, run):
        table = report.format_table(run_stages(run, workdir))
        if coordination.is_main():
            print(table)
            print(f"\nreport, metrics, checkpoints and the figure of selected tokens: {workdir}")


if __name__ == "__main__":
    sys.exit(main())
