"""Pretrain, fit selectors, fine-tune and evaluate, as a configuration says.

    python -m tosa_jax.main --config=configs/digits.py [--workdir=DIR] [--config.FIELD=VALUE ...]

Start the same command again to go on where a run stopped. Exit status: 0 done, 2 bad input, 130 or 143 stopped by a
signal after a checkpoint.
"""

import sys
from pathlib import Path

from tosa_jax import command_line


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return command_line.run(__doc__, sys.argv[1:] if argv is None else argv, _train)


def _train(config, workdir: Path) -> None:
    # Imported late, so that a wrong command line is told at once.
    from tosa_jax import report
    from tosa_jax.checkpoints import open_workdir
    from tosa_jax.config import make_run_config
    from tosa_jax.stages import run_stages

    run = make_run_config(config)
    with open_workdir(workdir, run):
        print(report.format_table(run_stages(run, workdir)))
    print(f"\nreport, metrics, checkpoints and the figure of selected tokens: {workdir}")


if __name__ == "__main__":
    sys.exit(main())
