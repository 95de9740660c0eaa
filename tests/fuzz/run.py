"""A seeded fuzzer of llamac's commands: damaged checkpoints, bundles and options.

`python tests/fuzz/run.py --seed 1 --tries 2000` ends with 1 if any try ends otherwise than in a
result, or in one line that refuses it. What a try does depends on the seed, its kind and its number
alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).parents[1]))  # the tests, whose tiny models these are

# Imported once, not in every try.
import sentencepiece  # noqa: F401
import tiktoken  # noqa: F401
import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401
from judge import FAULTS, OUTCOMES, Ended, fingerprint, judge
from kinds import KINDS, Trial, make_trial, seal_manifest
from seeds import Seeds, make_seeds
from worker import Worker, limit_resources

import llamac.export.verify  # noqa: F401
import llamac.runtime.cli.dispatch  # noqa: F401
import llamac.runtime.ort.ort_backend  # noqa: F401
from llamac.runtime.cli import main as llamac

_TIME_LIMIT_S = 90  # by the clock; of computing it has less


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tries and prints what came of them.

    Args:
        argv: The words after the program's name; None takes the process's own.

    Returns:
        0, or 1 if there was a fault.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=int, default=550, help="of all kinds together")
    parser.add_argument("--what", default=",".join(KINDS), help="kinds, comma-separated")
    parser.add_argument("--jobs", type=int, default=1, help="tries at a time")
    parser.add_argument("--only", type=int, metavar="N", help="try N alone, its output shown")
    args = parser.parse_args(argv)
    kinds = args.what.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--what has {', '.join(sorted(unknown))}; kinds are {', '.join(KINDS)}")
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llamac-fuzz-") as root:
        fuzzer = Fuzzer(Path(root), seed=args.seed)
        if args.only is not None:
            ended, trial = fuzzer.finish(fuzzer.start(kinds[0], args.only))
            print(f"{trial}\n{ended.out}{ended.err}exit {ended.code}")
            print(fuzzer.judge(trial, ended))
            return 0
        wanted = [(kinds[i % len(kinds)], i // len(kinds)) for i in range(args.tries)]
        counts = _run_all(fuzzer, wanted, jobs=args.jobs, options=f"--seed {args.seed}")
    _print_table(counts)
    num_faults = sum(counts[key] for key in counts if key[1] in FAULTS)
    print(f"{args.tries} tries, {time.monotonic() - begin:.0f} s, {num_faults} faults")
    return 1 if num_faults else 0


class Fuzzer:
    """The sound seeds, and tries made of them.

    Args:
        root: A folder for them.
        seed: Of the damage.
    """

    def __init__(self, root: Path, *, seed: int) -> None:
        self._root, self._seed = root, seed
        self._sound: dict[tuple[str, ...], object] = {}
        self._num_started = 0
        for variable in ("HOME", "XDG_CACHE_HOME", "TMPDIR"):
            os.environ[variable] = str(root)
        folder = root / "seeds"
        gc.freeze()  # or each fork copies what the collector touches
        made = Worker(folder, lambda: make_seeds(folder) or 0, limit_s=300).wait()
        if made.code != 0:
            raise RuntimeError(f"the seeds can't be made: {made.err}")
        options = json.loads((folder / "options.json").read_bytes())
        self._seeds = Seeds(root=folder, options=options)
        manifest = json.loads((folder / "bundle" / "bundle.json").read_bytes())
        if json.loads(seal_manifest(manifest)) != manifest:
            raise RuntimeError("a manifest's digest is computed in another way than the forger's")

    def start(self, kind: str, number: int) -> Worker:
        """Begins try `number` of a kind."""
        rng = Random(f"{self._seed}/{kind}/{number}")
        return self._start(lambda: make_trial(kind, rng, self._seeds, self._copy))

    def finish(self, worker: Worker) -> tuple[Ended, Trial]:
        """How a try ended, and what it was; its folder is removed."""
        ended = worker.wait()
        try:
            trial = Trial(**json.loads((worker.folder / "trial.json").read_bytes()))
        except FileNotFoundError:
            raise RuntimeError(f"a trial can't be made: {ended.err}") from None
        shutil.rmtree(worker.folder)
        return ended, trial

    def judge(self, trial: Trial, ended: Ended) -> str:
        """Sorts the end of a try; see judge.judge."""
        sound = None
        if trial.allowed == "same" and ended.code == 0 and trial.argv[0] != "export":
            sound = self._sound_fingerprint(trial)
        names: tuple[str, ...] = ()
        if trial.seed:
            files = (path.name for path in (self._seeds.root / trial.seed).iterdir())
            names = (*files, f"{trial.seed}/", f"{trial.seed}:")
        return judge(ended, allowed=trial.allowed, sound=sound, names=names)

    def _sound_fingerprint(self, trial: Trial) -> object:
        key = tuple(trial.argv)
        if key not in self._sound:
            ended, _ = self.finish(self._start(lambda: self._undamaged(trial)))
            if ended.code != 0:
                raise RuntimeError(f"{trial.argv} is refused without any damage: {ended.err}")
            self._sound[key] = fingerprint(ended.out)
        return self._sound[key]

    def _undamaged(self, trial: Trial) -> Trial:
        self._copy(trial.seed)
        return trial

    def _start(self, make: Callable[[], Trial]) -> Worker:
        self._num_started += 1

        def work() -> int:
            shutil.copy(self._seeds.root / "text.txt", ".")
            trial = make()
            Path("trial.json").write_text(json.dumps(asdict(trial)))
            limit_resources()
            return llamac(trial.argv)

        return Worker(self._root / f"try{self._num_started}", work, limit_s=_TIME_LIMIT_S)

    def _copy(self, name: str) -> Path:
        return Path(shutil.copytree(self._seeds.root / name, name))


def _run_all(
    fuzzer: Fuzzer, wanted: Iterable[tuple[str, int]], *, jobs: int, options: str
) -> Counter[tuple[str, str]]:
    """Runs tries, naming each fault when it is found; counts them by kind and outcome."""
    counts: Counter[tuple[str, str]] = Counter()
    running: list[tuple[str, int, Worker]] = []

    def finish_one() -> None:
        kind, number, worker = running.pop(0)
        ended, trial = fuzzer.finish(worker)
        verdict = fuzzer.judge(trial, ended)
        outcome = verdict.partition(":")[0]
        counts[kind, outcome] += 1
        if outcome in FAULTS:
            last_line = ended.err.strip().rpartition("\n")[2]
            print(f"{verdict}\n    {trial.note!a:.150}\n    {last_line!a:.200}")
            print(f"    llamac {' '.join(trial.argv)!a:.200}")
            print(f"    python tests/fuzz/run.py {options} --what {kind} --only {number}\n")
            sys.stdout.flush()

    for kind, number in wanted:
        if len(running) == jobs:
            finish_one()
        running.append((kind, number, fuzzer.start(kind, number)))
    while running:
        finish_one()
    return counts


def _print_table(counts: Counter[tuple[str, str]]) -> None:
    kinds = [kind for kind in KINDS if any(counts[kind, outcome] for outcome in OUTCOMES)]
    print(f"{'':12}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    for kind in kinds:
        print(f"{kind:12}" + "".join(f"{counts[kind, outcome]:12}" for outcome in OUTCOMES))
    sums = [sum(counts[kind, outcome] for kind in kinds) for outcome in OUTCOMES]
    print(f"{'all':12}" + "".join(f"{number:12}" for number in sums))


if __name__ == "__main__":
    sys.exit(main())
