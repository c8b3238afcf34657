"""`python -m tests.fake_line.cli PLAN.json COMMAND...`: the real command line, over a plan of fake stages."""

import json
import sys
from pathlib import Path

import pipeline.cli.build
from pipeline.cli import main
from pipeline.engine.step import Plan


def run(plan: Path, argv: list[str]) -> int:
    """The planner alone is left out: it knows the real stages only."""
    made = Plan.load(json.loads(plan.read_text()))
    vars(pipeline.cli.build)["plan"] = lambda *_: made
    return main(argv)


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
