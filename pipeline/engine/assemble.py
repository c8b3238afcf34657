"""The bundle: what the device gets. Built in a folder beside, then put in place by rename, so no reader sees half."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from pipeline.core.canonical import file_digest
from pipeline.core.errors import StageFailed
from pipeline.core.record import RunRecord
from pipeline.engine.disk import copy_hashed, remove, sync, write_atomic, writing
from pipeline.engine.step import Plan
from pipeline.engine.store import Damaged, Store

Render = Callable[[RunRecord, Mapping[str, Path]], str]

PREFIX = "bundle/"
CONTRACT = "contract.json"
MANIFEST, SEAL = "manifest.json", "manifest.sha256"
_SCHEMA = 1


def assemble(folder: Path, record: RunRecord, plan: Plan, store: Store, report: str) -> Path:
    """Write `folder/bundle` from a complete record; returns its path.

    The export stage's `bundle/...` files, the report, the record, and the manifest that names every one of them.
    Pass the record `as_made`: then a build that changes nothing leaves the bundle's bytes as they were.
    Raises `StageFailed` where export gave no contract, `Damaged` where a stored file is not what it was, `BadInput`
    where the disk refuses.
    """
    sweep(folder)
    part = folder / f".bundle-{uuid4().hex}"
    last = record.chosen()[-1].artifact.files
    shipped = {name.removeprefix(PREFIX): found for name, found in last.items() if name.startswith(PREFIX)}
    if CONTRACT not in shipped:
        raise StageFailed(f"{plan.steps[-1].name} gave no {PREFIX}{CONTRACT}, so there is nothing to ship")
    try:
        with writing(folder):
            _fill(part, shipped, record, plan, store, report)
            if _intact(folder / "bundle", part):
                remove(part)  # the very bundle that lies there, with what `finish` may have added on this device
            else:
                _swap(part, folder / "bundle")
    except BaseException:
        remove(part)
        raise
    return folder / "bundle"


def as_made(record: RunRecord) -> RunRecord:
    """The record without what was reused this time, which says nothing about the artifact."""
    return record.model_copy(
        update={"stages": tuple(stage.model_copy(update={"reused": False}) for stage in record.stages)}
    )


def withdraw(folder: Path) -> None:
    """Take an older bundle away: after a refusal it no longer matches its run."""
    with writing(folder):
        bundle = folder / "bundle"
        if bundle.exists():
            bundle.rename(folder / f".bundle-{uuid4().hex}")
        sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what a killed build left beside its bundle. Hold the run's lock."""
    with writing(folder):
        for path in folder.glob(".bundle-*"):
            remove(path)


def point(link: Path, name: str) -> bool:
    """Make the symbolic link `link` lead to its neighbour `name`; False where something else has that name."""
    if link.exists() and not link.is_symlink():
        return False
    with writing(link):
        spare = link.with_name(f".{link.name}-{uuid4().hex}")
        spare.symlink_to(name)
        spare.replace(link)
    return True


def readable(data: object) -> bytes:
    """JSON that people can read too; sorted, so that equal records have equal bytes."""
    return json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _fill(part: Path, shipped: Mapping[str, str], record: RunRecord, plan: Plan, store: Store, report: str) -> None:
    for name, found in sorted(shipped.items()):
        _ship(store, found, part / name)
    contract = json.loads((part / CONTRACT).read_bytes())
    (part / CONTRACT).unlink()  # all of it goes into the manifest
    write_atomic(part / "report.html", report.encode())
    write_atomic(part / "record.json", readable(record.dump()))
    write_atomic(part / MANIFEST, readable(_manifest(contract, record, plan, part)))
    write_atomic(part / SEAL, f"{file_digest(part / MANIFEST)}  {MANIFEST}\n".encode())
    for inner in (part, *(path for path in part.rglob("*") if path.is_dir())):
        sync(inner)


def _manifest(contract: Mapping[str, Any], record: RunRecord, plan: Plan, folder: Path) -> dict[str, Any]:
    ours = {
        "schema_version": _SCHEMA,
        "name": record.name,
        "target": record.spec.target,
        "measurements": [m.dump() for _, m in sorted(record.latest().items())],
        "owed": [limit.dump() for step in plan.steps for limit in step.budget if limit.on_device],
        "lineage": {
            "spec": record.spec_digest,
            "data": record.data_digest,
            "environment": record.environment,
            "stages": [{"stage": s.name, "key": s.key, "files": s.artifact.files} for s in record.chosen()],
        },
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        },
    }
    if clash := sorted(set(contract) & set(ours) - {"schema_version"}):
        raise StageFailed(f"{PREFIX}{CONTRACT} names {', '.join(clash)}, which the line itself fills in")
    return {**contract, **ours}


def _ship(store: Store, found: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        copied, _ = copy_hashed(store.blob(found), file)
    if copied != found:
        store.open({target.name: found})  # sets it aside and raises
        raise Damaged(target.name)  # it has been healed meanwhile; copy again


def _intact(bundle: Path, part: Path) -> bool:
    """Whether the bundle there has the manifest of the new one, and its files the digests in it."""
    try:
        if any((bundle / name).read_bytes() != (part / name).read_bytes() for name in (MANIFEST, SEAL)):
            return False
        files = json.loads((part / MANIFEST).read_bytes())["files"].items()
        return all(file_digest(bundle / name) == entry["sha256"] for name, entry in files)
    except OSError:
        return False


def _swap(new: Path, place: Path) -> None:
    if place.exists():
        place.rename(place.with_name(f".bundle-{uuid4().hex}"))
    new.rename(place)
    sync(place.parent)
    sweep(place.parent)
