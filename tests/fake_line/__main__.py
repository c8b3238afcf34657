"""`python -m tests.fake_line PLAN.json RUNS`: build a plan of fake stages; for tests that kill processes."""

import json
import sys
from pathlib import Path

from pipeline.core.errors import TemperError
from pipeline.engine.build import build
from pipeline.engine.step import Plan


def main(plan: Path, runs: Path) -> int:
    try:
        built = build(
            Plan.load(json.loads(plan.read_text())), runs, runs, {"report.html": lambda record, _: f"<p>{record.name}"}
        )
    except TemperError as error:
        print(f"temper: {error}", file=sys.stderr)
        return error.status
    return 0 if built.refused is None else built.refused.status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
