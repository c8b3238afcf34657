"""The plan: every section parsed by its owner, every demand and need checked, before anything expensive starts.

All findings are reported together. The plan itself is cached by the digest of the merged spec, the target's page, the
code, the libraries' versions and the marks of the data files, all computed without importing a stage, so an unchanged
spec is planned without torch.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core.canonical import canonical, derive_seed, digest
from pipeline.core.errors import SpecError, nearest
from pipeline.core.gate import Budget, Limit, beyond
from pipeline.core.spec import Draft, Spec
from pipeline.core.stage import ORDER
from pipeline.core.target import Target
from pipeline.engine import fingerprint, pages, sections, shape
from pipeline.engine.disk import write_atomic
from pipeline.engine.step import Plan, Step
from pipeline.engine.unlike import unlike

_LIBRARIES = (
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "torch-pruning",
    "torchvision",
    "safetensors",
    "pydantic",
    "pillow",
)

# What `finish` measures on the device.
_ON_DEVICE = ("latency.p50", "latency.p95", "memory.peak")


def plan(draft: Draft, target: str | None, runs: Path, data_root: Path) -> Plan:
    """Raises `SpecError` with every finding at once, `BadInput` for what lies outside the spec (data, installation)."""
    data = dict(draft.data)
    if target is not None:
        data["target"] = target
    findings = [*shape.top_level(draft, data), *shape.unusable(draft, data)]
    name = str(data.get("target", "reference"))
    if name not in pages.target_names():
        where = "--target" if target is not None else draft.where(("target",))
        findings.append(f'{where}: no target "{name}"{nearest(name, pages.target_names())}')
    data = shape.sound(data)
    if findings and ("task" not in data or name not in pages.target_names() or any(shape.unusable(draft, data))):
        raise SpecError(findings)  # the owners of the sections could not read it, or would find fault with the wrong
    page = pages.target(name)
    memo = runs / "store" / "plans" / f"{_memo_key(data, page, data_root)}.json"
    known = None if findings else _remembered(memo)
    return known or _fresh(Draft(data, draft.places), page, runs, data_root, memo, findings)


def _memo_key(data: Mapping[str, Any], page: Target, data_root: Path) -> str:
    versions = fingerprint.versions((*_LIBRARIES, *page.needs))
    return digest(["plan", data, page.dump(), *_code(), versions, str(data_root.resolve())])


def _code() -> tuple[object, ...]:
    return fingerprint.tree_digest(), fingerprint.plugins()


def _remembered(memo: Path) -> Plan | None:
    try:
        stored = json.loads(memo.read_text(encoding="utf-8"))
        body = {key: stored[key] for key in ("files", "plan")}
        if stored["digest"] != digest(body) or fingerprint.marks(stored["files"]) != stored["files"]:
            return None
        return Plan.load(stored["plan"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _remember(memo: Path, plan_: Plan, files: Sequence[Path]) -> None:
    marks = fingerprint.marks(fingerprint.with_folders(files))
    body = {"files": marks, "plan": plan_.dump()}
    write_atomic(memo, canonical({**body, "digest": digest(body)}))


def _fresh(draft: Draft, page: Target, runs: Path, data_root: Path, memo: Path, found: Sequence[str]) -> Plan:
    data = draft.data
    findings = list(found)
    task_type = sections.task_type()
    task = sections.parsed(task_type, data["task"], ("task",), draft, findings)
    budgets = {kind: _budgets(data.get(kind, {}), kind, draft, findings) for kind in ("budget", "regression")}
    budget = {name: _over(page.budget.get(name, ()), budgets["budget"].get(name, ())) for name in ORDER}
    stages = {name: pages.under(page.sections, name, data.get("stages", {}).get(name, {})) for name in ORDER}
    task_dump = {} if task is None else task.model_dump(mode="json")
    planned = []
    for name in ORDER:
        section = sections.plan_section(name, stages[name], budget[name], task, draft, findings)
        if section is not None:
            planned.append(section)
    if task is not None and len(planned) == len(ORDER):
        findings += _unmeasured(budget, budgets["regression"], planned, draft)
    missing = [name for name, version in fingerprint.versions(page.needs).items() if version == "absent"]
    findings += [f'target {page.name} needs "{name}", which is not installed; `pip install {name}`' for name in missing]
    spec = _spec({**data, "task": task_dump, "stages": stages}, {**budgets, "budget": budget}, page, draft, findings)
    if findings or spec is None or task is None:
        raise SpecError(tuple(dict.fromkeys(findings)))
    files = sections.data_files(task, data_root)
    steps = tuple(
        Step(
            name=section.name,
            module=f"stages.{section.name}",
            attempts=section.attempts,
            bisect=section.bisect,
            budget=budget[section.name],
            libraries=section.libraries,
            seed=derive_seed(spec.seed, section.name),
            timeout_seconds=section.timeout_seconds,
            procs=section.procs,
        )
        for section in planned
    )
    made = Plan(
        spec=spec,
        spec_digest=digest(spec.dump()),
        data_digest=fingerprint.data_digest(files, data_root, runs / "store" / "data.json"),
        steps=steps,
    )
    _remember(memo, made, files)
    return made


def _budgets(tables: Mapping[str, Any], kind: str, draft: Draft, findings: list[str]) -> dict[str, Budget]:
    found = {}
    for name, rows in tables.items():
        limits: list[Limit] = []
        for number, row in enumerate(rows):
            at = (kind, name, str(number))
            limit = sections.parsed(Limit, row, at, draft, findings)
            if limit is not None:
                findings += [f"{draft.where((*at, key))}: {text}" for key, text in beyond(limit)]
                limits.append(limit)
        found[name] = tuple(limits)
    return found


def _over(defaults: Budget, own: Budget) -> Budget:
    """A limit of the spec on the same metric replaces the target's."""
    named = {limit.metric for limit in own}
    return (*(limit for limit in defaults if limit.metric not in named), *own)


def _unmeasured(
    budget: Mapping[str, Budget],
    regression: Mapping[str, Budget],
    planned: Sequence[sections.Section],
    draft: Draft,
) -> list[str]:
    """Limits on a metric that no run with these configs would measure, or not so that numbers compare."""
    findings: list[str] = []
    before: dict[str, sections.Section] = {}
    for section in planned:
        for kind, limits in (("budget", budget[section.name]), ("regression", regression.get(section.name, ()))):
            for limit in limits:
                at = draft.where((kind, section.name, *_row(draft, kind, section.name, limit.metric)))
                if limit.on_device:
                    if limit.metric not in _ON_DEVICE:
                        findings.append(
                            f'{at}: `finish` does not measure "{limit.metric}"{nearest(limit.metric, _ON_DEVICE)}'
                        )
                elif limit.metric not in section.measures:
                    hint = nearest(limit.metric, section.measures)
                    findings.append(f'{at}: {section.name} does not measure "{limit.metric}" with this config{hint}')
                elif kind == "budget" and limit.max_loss is not None and limit.metric not in before:
                    findings.append(f"{at}: max_loss on {limit.metric}: no earlier stage measures it to compare with")
                elif kind == "budget" and limit.max_loss is not None:
                    why = unlike(limit.metric, before[limit.metric], section)
                    findings += [f"{at}: max_loss on {limit.metric}: {why}"] if why else []
        before |= dict.fromkeys(section.measures, section)
    return findings


def _row(draft: Draft, kind: str, stage: str, metric: str) -> tuple[str, ...]:
    """The number of the limit in the spec; nothing where it is the target's."""
    rows = draft.data.get(kind, {}).get(stage, ())
    return next(((str(i),) for i, row in enumerate(rows) if row.get("metric") == metric), ())


def _spec(
    data: Mapping[str, Any],
    budgets: Mapping[str, Mapping[str, Budget]],
    page: Target,
    draft: Draft,
    findings: list[str],
) -> Spec | None:
    fields = {key: value for key, value in data.items() if key not in ("preset", "budget", "regression")}
    limits = {kind: {name: [x.dump() for x in b] for name, b in by.items() if b} for kind, by in budgets.items()}
    try:
        return Spec.load({**fields, **limits, "target": page.name})
    except ValidationError as error:
        findings += sections.sentences(error, Spec, (), draft)
        return None
