"""What a run is, as its checkpoints say: its configuration and its data. Another run does not go on from them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tosa_jax.config import RunConfig, run_differences, to_json
from tosa_jax.data.pipeline import DatasetFacts
from tosa_jax.errors import WorkdirError


@dataclass(frozen=True)
class Identity:
    """A run and the data set that it reads."""

    run: RunConfig
    data: DatasetFacts

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        sizes = {"num_train": self.data.num_train, "num_eval": self.data.num_eval}
        return {
            "config": to_json(self.run),
            "data": sizes | {"fingerprint": self.data.fingerprint},
        }

    def check(self, said: Mapping[str, Any], where: str) -> None:
        """Raises WorkdirError if a checkpoint says another run or other data; earlier versions said nothing.

        where  the checkpoint, for the message.
        """
        if lines := run_differences(said.get("config") or {}, self.run, durations=False):
            raise WorkdirError(
                f"{where} is of another configuration ({'; '.join(lines[:6])}); give another --workdir, or set these "
                "fields back"
            )
        before, now = said.get("data"), self.to_json()["data"]
        if before and before != now:
            raise WorkdirError(
                f"{where} was trained on other data: {_called(before)}; {self.run.data.name} has now {_called(now)}. "
                "Put the earlier data back, or give another --workdir"
            )


def _called(data: Mapping[str, Any]) -> str:
    return (
        f"{data.get('num_train')} training and {data.get('num_eval')} evaluation examples, fingerprint "
        f"{data.get('fingerprint')}"
    )
