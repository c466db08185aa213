"""``make bench``: speed and memory as ratios against named baselines. ``ARGS="calling pulling"`` picks some."""

from __future__ import annotations

import importlib
import sys

from benchmarks.harness import ROOT, Result, save, table

ROOMS = (
    "compiling",
    "calling",
    "pulling",
    "memory",
    "fabric",
    "minilm",
    "pruning",
    "olive",
    "peers",
    "tflite_files",
    "fleet",
    "gates",
    "pages",
    "drift",
    "serving",
    "gathering",
    "generation",
    "stages",
)


def main() -> int:
    """Run the rooms that were asked for, or all; 1 where a goal was missed."""
    wanted = sys.argv[1:] or list(ROOMS)
    if unknown := sorted(set(wanted) - set(ROOMS)):
        print(f"unknown: {unknown[0]}; there are {', '.join(ROOMS)}", file=sys.stderr)
        return 2
    results: list[Result] = []
    for room in wanted:
        results += importlib.import_module(f"benchmarks.{room}").run()
    print(table(results))
    save(results, ROOT / "bench-out" / "results.json")
    return 0 if all(result.met for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
