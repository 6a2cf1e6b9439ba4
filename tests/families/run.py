"""Every text family of transformers through whet, judged by plain transformers: `make families`.

    python tests/families/run.py [--only NAME ...] [--jobs N] [--distances]

NAME is a family (llama) or a family for a task (llama:classification). Without --only the result is also written to
docs/families.md and its Korean twin. The exit code is 1 where a family is neither right nor refused.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"WHET_CACHE": "off", "HF_HUB_OFFLINE": "1"}

from families.configs import entries
from families.judge import Verdict, judged
from families.korean import PAGE, TWIN, twin
from families.table import document

LIMIT_SECONDS = 180
TOLD = ("attention as", "padded instead", "without a cache", "left as they are", "beside the text part", "generate:")


class TooLong(BaseException):
    """A family that takes more than its time."""


def one(name: str) -> Verdict:
    """The verdict on one family, in a process that may have judged others before."""
    import torch

    from whet.base.console import quiet_libraries

    torch.set_num_threads(1)
    quiet_libraries()
    entry = next(entry for entry in entries() if entry.name == name)
    said = io.StringIO()

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_SECONDS)
    try:
        with tempfile.TemporaryDirectory() as place, contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            verdict = judged(entry, Path(place) / "family")
    except TooLong:
        return Verdict(name, "crash", f"not done after {LIMIT_SECONDS} s")
    finally:
        signal.alarm(0)
    lines = said.getvalue().splitlines()
    verdict.notes += dict.fromkeys(line.strip() for line in lines if any(phrase in line for phrase in TOLD))
    return verdict


def verdicts(names: Sequence[str], jobs: int) -> Iterable[Verdict]:
    """The verdicts in the order of the names, each as soon as it is there."""
    if jobs == 1:
        yield from map(one, names)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, names)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="families, or family:task")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--distances", action="store_true", help="also print how far each was from plain transformers")
    asked = parser.parse_args(words)
    names = [entry.name for entry in entries()]
    if asked.only:
        names = [name for name in names if name in asked.only or name.partition(":")[0] in asked.only]
        if not names:
            parser.error(f"transformers has no such text family: {', '.join(asked.only)}")
    found = []
    for verdict in verdicts(names, asked.jobs):
        found.append(verdict)
        print(f"{len(found)}/{len(names)} {verdict.name}: {verdict.outcome} {verdict.reason}".rstrip(), flush=True)
        if asked.distances:
            print("".join(f"    {share:.1e} {what}\n" for what, share in verdict.distances.items()), end="", flush=True)
    counts = Counter(verdict.outcome for verdict in found)
    held = sum(verdict.holds for verdict in found)
    print(
        f"families: {held}/{len(found)} hold ({', '.join(f'{count} {name}' for name, count in counts.most_common())})"
    )
    if not asked.only:
        page = document(found)
        PAGE.write_text(page, encoding="utf-8")
        TWIN.write_text(twin(page), encoding="utf-8")
        print(f"written: {PAGE} and {TWIN}")
    return int(held < len(found))


if __name__ == "__main__":
    sys.exit(main())
