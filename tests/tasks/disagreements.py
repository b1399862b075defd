"""List the completions that task math and math-verify's own pipeline judge differently.

    python -m tests.tasks.disagreements FILE [FILE ...]

A file has rows of ``completion`` and ``answer``, or ``gold`` as the ``samples.jsonl`` of a run.
math-verify reads the whole completion after the thought by its defaults; task math compares what its own extractor
finds there.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from math_verify import parse, verify

from mlx_traces.readers import file_rows
from mlx_traces.records import Problem
from mlx_traces.tasks import math
from mlx_traces.tasks.thoughts import answer_part


def disagreements(file: Path) -> Iterator[str | None]:
    """Yield for each row None, or a line: its place, the gold answer, and each side's answer and verdict."""
    for where, row in file_rows(file, ("completion",)):
        gold = str(row["gold"] if "gold" in row else row["answer"])
        own = math.grade(Problem(where, {}, gold), row["completion"])["tolerant"]
        theirs = parse(answer_part(row["completion"]))
        said = verify(parse(f"${gold}$"), theirs)
        line = f"{where}: gold {gold!r}; task math {own.extracted!r} {own.verdict}; math-verify {theirs} {said}"
        yield None if own.correct == said else line


def main() -> None:
    """Print the lines of all files, and their number."""
    options = argparse.ArgumentParser(prog="python -m tests.tasks.disagreements", description=__doc__.split("\n")[0])
    options.add_argument("files", nargs="+", type=Path)
    lines = [line for file in options.parse_args().files for line in disagreements(file)]
    found = [line for line in lines if line]
    sys.stdout.write("".join(f"{line}\n" for line in (*found, f"{len(found)} of {len(lines)} judged differently")))


if __name__ == "__main__":
    main()
