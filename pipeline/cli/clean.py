"""`clean`: drop what no kept record reaches; `--verify` rehashes the store instead."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from pipeline.core.errors import Tampered
from pipeline.core.record import RunRecord
from pipeline.engine.disk import remove, writing
from pipeline.engine.store import Store
from pipeline.report.records import read_record


def run(args: argparse.Namespace) -> int:
    root = args.runs / "store"
    if not root.is_dir():
        print(f"{root}: no store here, nothing to do")
        return 0
    store = Store(root, print)
    return _verify(store, args.dry_run) if args.verify else _collect(store, args.runs, args.dry_run)


def _verify(store: Store, dry_run: bool) -> int:
    """Raises `Tampered` naming every damaged entry."""
    bad = store.verify(repair=not dry_run)
    if bad:
        then = (
            "nothing was changed; without --dry-run they are set aside"
            if dry_run
            else "set aside; the next build makes them again"
        )
        raise Tampered("\n".join([f"{store.root}: {len(bad)} damaged", *(f"  {line}" for line in bad), then]))
    blobs = sum(1 for _ in store.root.glob("blobs/*/*"))
    print(f"{store.root}: {blobs} stored files, every byte as recorded")
    return 0


def _collect(store: Store, runs: Path, dry_run: bool) -> int:
    with store.alone():
        # A record that cannot be read stops us: what it reaches is unknown, and dropping it could cost hours.
        records = [read_record(path) for path in sorted(runs.glob("*/record.json")) if not path.parent.is_symlink()]
        plans = _plans(store.root, records)
        doomed = [*store.collect((s.key for r in records for s in r.stages), dry_run=True), *plans]
        size = sum(_bytes(path) for path in doomed)
        if not dry_run:
            store.collect(s.key for r in records for s in r.stages)
            for path in plans:
                with writing(path):
                    remove(path)
    word = "would drop" if dry_run else "dropped"
    print(f"{store.root}: {len(records)} records kept, {word} {len(doomed)} entries, {size:,} bytes")
    return 0


def _plans(root: Path, records: Iterable[RunRecord]) -> list[Path]:
    """Remembered plans that no record was made by; each costs a moment to make again."""
    kept = {record.spec_digest for record in records}
    doomed = []
    for path in sorted(root.glob("plans/*")):
        try:
            made_by = json.loads(path.read_bytes())["plan"]["spec_digest"]
        except (ValueError, KeyError, TypeError):
            made_by = None
        if made_by not in kept:
            doomed.append(path)
    return doomed


def _bytes(path: Path) -> int:
    if path.is_dir():
        return sum(inner.lstat().st_size for inner in path.rglob("*") if not inner.is_dir())
    return path.lstat().st_size
