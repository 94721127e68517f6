"""Stops a small run of all stages at random moments, starts it again each time, and compares what it leaves.

    python -m tests.kill [--kills=200] [--seed=0] [--signal=KILL|TERM|INT|HUP|USR1] [--stages=all|one]
        [--processes=1] [--minutes=60]

A moment is drawn as CPU time after the start, or as the run's n-th access to a file of its work directory. Most starts
are forks of this process, which has imported everything; every twentieth is a Python of its own. Sometimes worker
processes read, and sometimes the signal reaches the run but not its workers. When a run comes to its end, its
parameters, optimizer, averages, records, TensorBoard events, report and files must be those of a run that was left
alone, to the bit; then the next run begins. With several processes one of them is hit, and the others must end within a
minute, with a line. Prints a JSON object, and ends with status 1 if anything differed.
"""

import argparse
import collections
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# Read when JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/tests.kill.compiled")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

from tests.kill_starts import (
    Start,
    arguments,
    differences,
    end_state,
    in_fork,
    load_everything,
    prepare,
)

PATIENCE = 400.0
"""Seconds after which a start counts as hanging."""

END_SECONDS = 60.0
"""Seconds within which the other processes end when one is killed."""

LIFE = {True: 3.5, False: 7.0}
"""Seconds of CPU time within which a fork, and a Python of its own, is killed."""

JOINING = 8
"""How many times as long several processes live: they take longer to join and to compile."""

ACCESSES = 250
"""Accesses to files within which a fork is killed; an undisturbed run has about ten times as many."""

FORBIDDEN = r"Traceback|is passed over|cannot |Segmentation|Fatal Python"
"""What no start may say."""

MOST_FAULTS = 10


class Trial:
    """Runs that are stopped over and over; `faults` has a line for each thing that is not as it should be.

    until  the monotonic time from which on no further stop is begun.
    """

    def __init__(self, folder: Path, args: argparse.Namespace, until: float) -> None:
        self.folder, self.stages, self.processes = folder, args.stages, args.processes
        self.signum = signal.Signals[f"SIG{args.signal}"]
        self.left, self.until = args.kills, until
        self.rng = np.random.default_rng([args.seed, self.signum, self.processes])
        self.faults: list[str] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.slowest = 0.0  # seconds from a signal to the end
        self.kills = self.runs = self.starts = 0
        self.expected = self.run_alone()

    @property
    def is_over(self) -> bool:
        """Whether no further start is stopped."""
        return self.kills >= self.left or time.monotonic() > self.until

    def begin(self, workdir: Path, *more: str, **how) -> list[Start]:
        """Starts all processes of the run."""
        argv = arguments(self.folder, workdir, self.stages, *more)
        logs = [self.folder / f"log{self.starts}.{i}" for i in range(self.processes)]
        if self.processes == 1:
            return [Start(argv, workdir, logs[0], **how)]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        argv += [
            "--multihost",
            f"--coordinator=localhost:{port}",
            f"--num_processes={self.processes}",
            "--join_timeout=30",
        ]
        return [
            Start([*argv, f"--process_id={i}"], workdir, log, **how) for i, log in enumerate(logs)
        ]

    def run_alone(self) -> dict:
        """The end of a run that is left alone."""
        workdir = self.folder / "alone"
        starts = self.begin(workdir)
        for start in starts:
            assert start.wait(PATIENCE) == 0, (start.status, start.said())
        return in_fork(lambda: end_state(workdir))

    def run(self) -> None:
        """One run to its end."""
        self.runs += 1
        workdir = self.folder / f"run{self.runs}"
        while not self.start(workdir):
            if len(self.faults) >= MOST_FAULTS:
                return
        found = differences(self.expected, in_fork(lambda: end_state(workdir)))
        for line in found[:5]:
            self.fault(f"at the end of run {self.runs}: {line}")
        if not found:
            shutil.rmtree(workdir)

    def start(self, workdir: Path) -> bool:
        """One start, stopped unless no more shall be. Returns whether the run came to its end."""
        self.starts += 1
        last = self.is_over
        forked = last or self.starts % 20 != 0
        alone = self.processes == 1 and self.signum == signal.SIGKILL
        by_access = not last and forked and alone and self.rng.random() < 0.5
        after = self.rng.uniform(0, LIFE[forked] * (1 if self.processes == 1 else JOINING))
        access = int(self.rng.integers(1, ACCESSES)) if by_access else 0
        group = self.rng.random() < 0.7  # else the signal goes to the leader, not to its workers
        more = ["--config.data.workers=processes:1"] if self.rng.random() < 0.15 else []
        starts = self.begin(workdir, *more, forked=forked, kill_at=access)
        moment = f"access {access}" if by_access else f"{after:.2f} s"
        how = f"start {self.starts} of run {self.runs}, {moment}{', with workers' if more else ''}"
        victim = starts[int(self.rng.integers(len(starts)))]
        if not last and not by_access and victim.wait_until_used(after):
            self.counts["with worker processes"] += victim.others() > 0
            victim.send(self.signum, group=group)
            sent = time.monotonic()
            for start in starts:
                start.wait(PATIENCE)
            self.slowest = max(self.slowest, time.monotonic() - sent)
        statuses = [start.wait(PATIENCE) for start in starts]
        said = "\n".join(start.said()[-3000:] for start in starts)
        for wrong in (self.left_over(starts), self.wrong(starts, statuses, victim)):
            if wrong:
                self.fault(f"{how}: {wrong}\n{said}")
        if done := all(status == 0 for status in statuses):
            return done
        self.kills += 1
        self.counts[self.place(workdir, said)] += 1
        self.counts["while a checkpoint is written"] += any(
            workdir.glob("checkpoints/*/*orbax-checkpoint-tmp")
        )
        for start in starts:
            start.log.unlink()
        return False

    def left_over(self, starts: list[Start]) -> str:
        """What is wrong ten seconds after the end: processes that hang, or outlive their leader. They are killed."""
        hang = sum(start.status is None for start in starts)
        end = time.monotonic() + 10
        while (left := sum(start.others() for start in starts)) and time.monotonic() < end:
            time.sleep(0.05)
        for start in starts:
            start.send(signal.SIGKILL)
            start.wait(PATIENCE)
        return f"{hang} hang" if hang else f"{left} processes outlive it" if left else ""

    def wrong(self, starts: list[Start], statuses: list[int | None], victim: Start) -> str:
        """What is wrong with the statuses and the words of a start; "" if nothing is."""
        killed = self.signum == signal.SIGKILL
        stopped = -signal.SIGKILL if killed else 128 + self.signum
        for start, status in zip(starts, statuses, strict=True):
            said = start.said()
            other = killed and start is not victim
            if other and status == 2 and "did not join" in said:
                continue  # the other one was killed before it joined
            if status not in {0, 1 if other else stopped}:
                return f"status {status}"
            if found := re.search(FORBIDDEN, said):
                return f"says {found[0]!r}"
            if status and status > 0 and "start the same command again" not in said:
                return "does not say how to go on"
        if killed and self.slowest > END_SECONDS:
            return f"the others ended {self.slowest:.0f} s after it"
        return ""

    def place(self, workdir: Path, said: str) -> str:
        """In which part of the run a start was ended, by what it said last and by its files."""
        if (workdir / "report.json").exists():
            return "at the end"
        stages = re.findall(r"^(pretrain|selector|finetune) step (\d+)", said, re.M)
        if not stages:
            return "starting"
        last = ("finetune", "8") if self.stages == "all" else ("pretrain", "12")
        return "after the last step" if stages[-1] == last else stages[-1][0]

    def fault(self, text: str) -> None:
        self.faults.append(text)
        print(f"FAULT {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", default="KILL", choices=["KILL", "TERM", "INT", "HUP", "USR1"])
    parser.add_argument("--stages", default="all", choices=["all", "one"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="no stop after so many")
    args, began = parser.parse_args(), time.monotonic()
    load_everything()
    if args.signal != "KILL":
        # A shell ignores some signals for what runs in the background, and starts would inherit that.
        signal.signal(signal.Signals[f"SIG{args.signal}"], signal.SIG_DFL)
    # Not a TemporaryDirectory: each fork would remove it at its end.
    folder = Path(tempfile.mkdtemp(prefix="tests.kill."))
    in_fork(lambda: prepare(folder))
    trial = Trial(folder, args, began + 60 * args.minutes)
    while not trial.is_over and len(trial.faults) < MOST_FAULTS:
        trial.run()
    said = {"signal": args.signal, "processes": args.processes, "kills": trial.kills}
    said |= {"seed": args.seed, "runs": trial.runs, "starts": trial.starts}
    said |= {"faults": len(trial.faults), "slowest end": round(trial.slowest, 1)}
    said |= {"seconds": round(time.monotonic() - began)}
    print(json.dumps(said | dict(sorted(trial.counts.items()))))
    if trial.faults:
        print(f"the files are in {folder}", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    return int(bool(trial.faults))


if __name__ == "__main__":
    sys.exit(main())
