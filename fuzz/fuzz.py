# SPDX-License-Identifier: Apache-2.0
"""Fuzzes readers with coverage as the guide: ``python fuzz/fuzz.py --seconds 3600 --findings /tmp/found``.

Needs `atheris` (`pip install atheris`; Linux, CPython). The first byte of an input says which reader gets the rest.
Findings are kept and the search goes on: one file per reader, kind of exception and place, with the traceback beside it.
What was found goes to ``fuzz/kept/READER/`` once it is mended; the tests read everything there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import atheris


os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else torch imports what is to be instrumented first
# What readers import when they are called as well: only what is imported here is a guide.
with atheris.instrument_imports(include=["lord_quant", "yaml", "json"], enable_loader_override=False):
    from readers import READERS, seeds
    from scene import make_scene

    from lord_quant.errors import LordError

MEMORY = 4 * 2**30
"""Bytes of address space that a reader may take beside what the process has before."""
SLOW = 60
"""Seconds that count as hanging."""
LONGEST = 2**15
"""Bytes of an input."""


def main() -> None:
    """Parses the command line and fuzzes until time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", default=list(READERS), metavar="READER", help=f"of {', '.join(READERS)}")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--findings", type=Path, required=True, help="folder for inputs that broke the law, and counts")
    parser.add_argument("--corpus", type=Path, help="folder that keeps what found new paths, for the next time")
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="lord-fuzz-"))
    scene, names = make_scene(root), list(READERS)
    corpus = args.corpus or root / "corpus"
    for folder in (corpus, args.findings):
        folder.mkdir(parents=True, exist_ok=True)
    for name in args.readers:
        starts = seeds(name, scene)
        READERS[name](starts[0], scene)  # a real file is legal
        for data in [*starts, *(path.read_bytes() for path in _kept(name))]:
            start = bytes([names.index(name)]) + data
            (corpus / hashlib.sha256(start).hexdigest()[:16]).write_bytes(start)
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (own + MEMORY, own + MEMORY))
    seconds, runs, refused = dict.fromkeys(names, 0.0), Counter[str](), Counter[str]()

    def try_one(data: bytes) -> None:
        name = names[data[0] % len(names)] if data else ""
        if name not in args.readers:
            return
        began = time.perf_counter()
        try:
            READERS[name](data[1:], scene)
        except LordError:
            refused[name] += 1
        except Exception as error:
            _keep(args.findings / name, data[1:], error)
        seconds[name] += time.perf_counter() - began
        runs[name] += 1
        if sum(runs.values()) % 100 == 0:
            told = {name: [runs[name], refused[name], round(seconds[name])] for name in runs}
            (args.findings / f"runs-{os.getpid()}.json").write_text(json.dumps(told))

    flags = [f"-max_total_time={args.seconds}", f"-timeout={SLOW}", f"-artifact_prefix={args.findings}/"]
    flags += [f"-max_len={LONGEST}", "-rss_limit_mb=0", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], try_one)
    atheris.Fuzz()


def _kept(name: str) -> list[Path]:
    return sorted((Path(__file__).parent / "kept" / name).glob("*.bin"))


def _keep(folder: Path, data: bytes, error: Exception) -> None:
    folder.mkdir(exist_ok=True)
    frames = traceback.extract_tb(error.__traceback__)
    place = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames) if "lord_quant" in f.filename), "")
    kind = hashlib.sha256(f"{type(error).__name__} {place}".encode()).hexdigest()[:12]
    if not (folder / f"{kind}.bin").exists():
        (folder / f"{kind}.bin").write_bytes(data)
        (folder / f"{kind}.txt").write_text("".join(traceback.format_exception(error))[-6000:], encoding="utf-8")
        print(f"FINDING {folder.name} {kind} {type(error).__name__} at {place}: {str(error)[:200]}", file=sys.stderr)


if __name__ == "__main__":
    main()
