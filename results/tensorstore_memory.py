"""What a call of TensorStore's `KvStore.Spec.to_json()` keeps for ever; Orbax makes one for each array that it saves.

    python results/tensorstore_memory.py [--calls=20000]

Writes results/tensorstore_memory.json: resident bytes and Python objects a call, after 2,000 calls that do not count.
"""

import argparse
import gc
import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

import tensorstore

OUT = Path(__file__).with_suffix(".json")


def resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=20000)
    calls = parser.parse_args().calls
    spec = tensorstore.KvStore.Spec({"driver": "file", "path": "/a/run/checkpoints/pretrain/100/"})
    for _ in range(2000):
        spec.to_json()
    gc.collect()
    before, objects = resident(), sys.getallocatedblocks()
    for _ in range(calls):
        spec.to_json()
    gc.collect()
    found = {
        "command": f"python results/tensorstore_memory.py --calls={calls}",
        "device": "cpu",
        "versions": {"python": sys.version.split()[0], "tensorstore": version("tensorstore")},
        "bytes_per_call": round((resident() - before) / calls, 1),
        "objects_per_call": round((sys.getallocatedblocks() - objects) / calls, 2),
    }
    OUT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
