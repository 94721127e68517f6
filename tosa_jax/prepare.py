"""Prepare the data set that a configuration names, once.

    python -m tosa_jax.prepare --config=configs/digits.py [--config.data.source_dir=DIR]
        [--config.data.data_dir=DIR] [--overwrite]

Works for the bundled digits, IDX files, ImageNet's two tar files, folders of images, and TFRecord
copies of TFDS sets; other TFDS sets need TensorFlow: pip install "tosa-jax[prepare]". Start the
same command again to continue where it was stopped. `--overwrite` prepares a data set again that is already there.
Exit status: 0 done, 2 bad input, 130 stopped by a signal.
"""

import shlex
import sys

from tosa_jax.cli import flags
from tosa_jax.cli.command import configure_jax, run_command
from tosa_jax.distributed.messages import say

_OVERWRITE = "--overwrite"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (without the program's name); returns the exit status."""
    return run_command(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    try:
        return _prepare(argv)
    except KeyboardInterrupt:
        say("stopped by SIGINT; start the same command again to go on")
        return 130


def _prepare(argv: list[str]) -> int:
    recipe = [arg for arg in argv if arg != _OVERWRITE]
    config, _ = flags.parse(__doc__, recipe)
    configure_jax()
    # Imported late: mistakes in the command line are reported without this delay.
    from tosa_jax.config import make_run_config
    from tosa_jax.data import builders
    from tosa_jax.data.builders.prepared import open_prepared

    data = make_run_config(config).data
    path = builders.prepare(
        data.name,
        data.data_dir,
        data.source_dir,
        overwrite=_OVERWRITE in argv,
        say=lambda line: print(line, flush=True),
    )
    splits = open_prepared(path).info.splits
    print(f"\n{data.name} is in {path}")
    for name, split in splits.items():
        print(f"  {name}: {split.num_examples} examples, {split.num_bytes}")
    for field in ("train_split", "eval_split"):
        # Not an error: training, for example, can do without the evaluation split.
        base = getattr(data, field).split("[")[0]
        if "+" not in base and base not in splits:
            print(f"  note: config.data.{field}={base!r} is not there")
    print(f"\nnext: python -m tosa_jax.main {shlex.join(recipe)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
