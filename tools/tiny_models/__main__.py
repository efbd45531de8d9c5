"""Trains the tiny models from random weights, in about an hour on two cores. A killed run continues.

PYTHONPATH=tools python -m tiny_models --out runs/world-models
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tiny_models.stages import run_recipe


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tiny_models", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--recipe", type=Path, help="a YAML file of stages; default: that of the shipped models"
    )
    parser.add_argument("--out", default="runs/world-models", help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="rendering processes; default: all cores")
    arguments = parser.parse_args(argv)
    if arguments.recipe is not None and not arguments.recipe.is_file():
        parser.error(f"{arguments.recipe}: no such file; name a YAML file, or leave --recipe out")
    for folder in run_recipe(arguments.recipe, arguments.out, arguments.workers):
        print(folder)


if __name__ == "__main__":
    main()
