"""Plans of the real stages: every finding at once and where it is, what attempts become, and what a plan remembers."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.canonical import derive_seed
from pipeline.core.errors import BadInput, SpecError
from pipeline.core.gate import Limit
from pipeline.core.spec import Draft, read
from pipeline.core.stage import ORDER
from pipeline.core.target import Target
from pipeline.engine import pages
from pipeline.engine.plan import plan
from pipeline.engine.step import Plan, Step

TASK = '[task]\ndata = "digits"\nthreat = { norm = "linf", eps = "0.1" }\n'
PLANTED = Path(__file__).resolve().parents[2] / "planted"
Planned = Callable[..., Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Plan a spec given as text, with its own folders for runs and data."""

    def make(text: str, target: str | None = None, settings: Sequence[str] = ()) -> Plan:
        return plan(drafted(tmp_path, text, settings), target, tmp_path / "runs", tmp_path / "data")

    return make


def drafted(folder: Path, text: str, settings: Sequence[str] = ()) -> Draft:
    path = folder / "spec.toml"
    path.write_text(text)
    return read(path, None, settings)


def refused(planned: Planned, text: str, target: str | None = None) -> list[str]:
    """The findings, each without the folder in front."""
    with pytest.raises(SpecError) as caught:
        planned(text, target)
    return [re.sub(r"^/.*/spec\.toml:", "spec.toml:", line) for line in caught.value.findings]


def step(made: Plan, name: str) -> Step:
    return next(found for found in made.steps if found.name == name)


def test_many_mistakes_are_told_at_once_each_with_its_line(planned: Planned) -> None:
    text = """
[task]
data = "digitz"
threat = { norm = "linf", eps = 8 }
holdout = 2

[stages.search]
arch = { builder = "small_cn" }

[stages.train]
epoch = 3
lr = "fast"

[stages.compress]
kind = "prun"

[stages.validate]
samples = 0
attacks = [{ kind = "pgd", stps = 3 }, "squar"]

[stages.export]
precision = "int9"
timeout_seconds = -1
procs = 0

[[budget.train]]
metric = "cost.params"
"""
    found = refused(planned, text)
    assert found == sorted(set(found), key=found.index)  # nothing twice
    for line, part in (
        (3, 'task.data: no method "digitz" in data; did you mean "digits"?'),
        (4, "task.threat: eps: expected at most 1, since pixels lie in [0, 1], got 8; did you mean"),
        (5, "task.holdout: expected less than 1, got 2"),
        (8, 'stages.search.arch: no method "small_cn" in builders; did you mean "small_cnn"?'),
        (11, 'stages.train.epoch: unknown key; did you mean "epochs"?'),
        (12, "stages.train.lr: expected a number"),
        (15, 'stages.compress.kind: no method "prun" in compressors; did you mean "prune"?'),
        (18, "stages.validate.samples: expected at least 2, got 0"),
        (19, 'stages.validate.attacks.0.stps: unknown key; did you mean "steps"?'),
        (19, 'stages.validate.attacks.1: no method "squar" in attacks; did you mean "square"?'),
        (23, "stages.export.timeout_seconds: expected a number above 0, got -1"),
        (24, "stages.export.procs: expected a whole number of at least 1, got 0"),
        (26, 'budget.train: limit on "cost.params": expected at_least, at_most or max_loss, got none of them'),
    ):
        assert any(one.startswith("spec.toml:") and part in one for one in found), (part, found)
        assert any(one.startswith(f"spec.toml:{line}: {part[:20]}") for one in found), (line, part, found)
    assert len(found) == 13  # and no finding that merely follows from another one


def test_a_precision_and_a_pass_that_no_one_offers_are_findings_like_any_other(planned: Planned) -> None:
    found = refused(planned, f'{TASK}[stages.train]\nepoch = 3\n[stages.export]\nprecision = "int9"\n')
    assert found == [
        'spec.toml:5: stages.train.epoch: unknown key; did you mean "epochs"?',
        'spec.toml:6: stages.export: this target offers no precision "int9"; there is fp32',
    ]
    (found_pass,) = refused(planned, f'{TASK}[stages.export]\nprecisions = {{ fp32 = ["fold_constant"] }}\n')
    assert found_pass == 'spec.toml:4: stages.export.attempts: no pass "fold_constant"; did you mean "fold_constants"?'


def test_the_top_level_is_checked_before_anything_is_imported(planned: Planned) -> None:
    text = "colour = 1\n[budgett]\n[stages.trian]\nx = 1\n[budget]\ntrain = 3\n[stages]\nvalidate = 3\n"
    assert refused(planned, text) == [
        "spec.toml:1: colour: unknown key; there is budget, name, preset, regression, seed, stages, target, task",
        'spec.toml:2: budgett: unknown key; did you mean "budget"?',
        'task: missing; expected a section such as [task] with data = "mnist" and a threat',
        'spec.toml:3: stages.trian: unknown stage; did you mean "train"?',
        "spec.toml:8: stages.validate: expected a table, got 3",
        "spec.toml:6: budget.train: expected tables, [[budget.train]], got 3",
    ]


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        ("0", "expected more than 0, got 0"),
        ("2", 'expected at most 1, since pixels lie in [0, 1], got 2; did you mean "2/255"?'),
        ('"8/0"', 'expected a number or a fraction such as "8/255", got "8/0"'),
        ('"abc"', 'expected a number or a fraction such as "8/255", got "abc"'),
        ("-0.1", "expected at least 0, got -0.1"),
        ("nan", "expected a finite number, got nan"),
    ],
)
def test_an_impossible_radius_is_the_only_finding(planned: Planned, eps: str, message: str) -> None:
    (found,) = refused(planned, TASK.replace('"0.1"', eps))
    assert message in found


def test_a_fraction_and_its_value_are_the_same_task(planned: Planned) -> None:
    fraction, value = (planned(TASK.replace('"0.1"', eps)) for eps in ('"8/255"', f"{8 / 255!r}"))
    assert fraction.spec.task == value.spec.task
    assert fraction.spec_digest == value.spec_digest


@pytest.mark.parametrize(
    ("text", "target", "message"),
    [
        (TASK, "x86", 'target: no target "x86"; did you mean "x86_cpu"?'),
        ('target = "jetsn"\n' + TASK, None, 'target: no target "jetsn"; did you mean "jetson"?'),
        (f'{TASK}[stages.train]\nkind = "trade"\n', None, 'no method "trade" in recipes; did you mean "trades"?'),
        (f'{TASK}[stages.search]\nkind = "random"\n', None, 'did you mean "random_search"?'),
        (f"{TASK}[stages.train]\nkind = 3\n", None, "expected the name of a method, got 3"),
    ],
)
def test_unknown_names_get_the_nearest(planned: Planned, text: str, target: str | None, message: str) -> None:
    (found,) = refused(planned, text, target)
    assert message in found


def test_an_unknown_preset_gets_the_nearest() -> None:
    with pytest.raises(SpecError, match=r'no preset "digit"; did you mean "digits"\?'):
        read(preset="digit")


def test_an_attack_that_has_no_version_for_the_norm_is_found_in_every_stage_that_names_it(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PLANTED)
    l1 = TASK.replace("linf", "l1")
    pgd = '[stages.export]\nattacks = ["pgd"]\n[stages.validate]\nattacks = ["pgd"]\n'
    found = refused(planned, f"{l1}{pgd.replace(chr(34) + 'pgd' + chr(34), chr(34) + 'temper_one_sided' + chr(34))}")
    assert [line.partition(":")[2].partition(" ")[2].split(":")[0] for line in found] == [
        "stages.validate",
        "stages.export.attempts",  # the reference target's attempts hold its config
    ]
    assert planned(l1 + pgd).spec.task["threat"]["norm"] == "l1"


def test_limits_on_what_nothing_measures_get_the_nearest_metric(planned: Planned) -> None:
    text = f"""{TASK}
[[budget.train]]
metric = "accuracy.robust.holdut"
at_least = 0.1
[[budget.validate]]
metric = "accuracy.robust.pgd_2.test"
at_least = 0.1
[[budget.search]]
metric = "cost.macs"
max_loss = 1
[[regression.export]]
metric = "size.modell"
at_most = 3
[[budget.export]]
metric = "latency.p99"
at_most = 3
on_device = true
"""
    assert refused(planned, text) == [
        "spec.toml:11: budget.search: max_loss on cost.macs: no earlier stage measures it to compare with",
        'spec.toml:5: budget.train: train does not measure "accuracy.robust.holdut" with this config; '
        'did you mean "accuracy.robust.holdout"?',
        'spec.toml:8: budget.validate: validate does not measure "accuracy.robust.pgd_2.test" with this config; '
        'did you mean "accuracy.robust.pgd.test"?',
        'spec.toml:17: budget.export: `finish` does not measure "latency.p99"; did you mean "latency.p95"?',
        'spec.toml:14: regression.export: export does not measure "size.modell" with this config; '
        'did you mean "size.model"?',
    ]


def test_what_is_measured_depends_on_the_config(planned: Planned) -> None:
    limit = '[[budget.validate]]\nmetric = "accuracy.certified.test"\nat_least = 0\n'
    assert planned(TASK + limit).steps[3].budget == (Limit(metric="accuracy.certified.test", at_least=0),)
    (found,) = refused(planned, f"{TASK}[stages.validate]\ncertify = []\n{limit}")
    assert 'validate does not measure "accuracy.certified.test" with this config' in found


def test_a_loss_may_be_limited_where_an_earlier_stage_measured_it(planned: Planned) -> None:
    limit = '[[budget.compress]]\nmetric = "accuracy.clean.holdout"\nmax_loss = 0.02\n'
    assert step(planned(TASK + limit), "compress").budget[0].max_loss == 0.02
    regression = '[[regression.search]]\nmetric = "cost.macs"\nmax_loss = 1\n'  # held against another record
    assert planned(TASK + regression).spec.regression["search"][0].max_loss == 1


@pytest.mark.parametrize(
    ("metric", "settings", "key"),
    [
        ("accuracy.robust.holdout", "holdout_samples = 200", "holdout_samples"),
        ("accuracy.clean.holdout", "holdout_samples = 200", "holdout_samples"),
        ("accuracy.robust.holdout", 'holdout_attack = "fgsm"', "holdout_attack"),
        ("accuracy.robust.holdout", "attempts = [{ tune_epochs = 1 }, { holdout_samples = 200 }]", "holdout_samples"),
        ("accuracy.clean.holdout", 'holdout_attack = "fgsm"', None),
        ("cost.macs", "holdout_samples = 200", None),
    ],
)
def test_a_loss_is_limited_only_between_stages_that_measure_alike(
    planned: Planned, metric: str, settings: str, key: str | None
) -> None:
    text = f'{TASK}[[budget.compress]]\nmetric = "{metric}"\nmax_loss = 0.02\n[stages.compress]\n{settings}\n'
    if key is None:
        assert step(planned(text), "compress").budget[0].max_loss == 0.02
        return
    assert refused(planned, text) == [
        f"spec.toml:4: budget.compress: max_loss on {metric}: compress.{key} and train.{key} differ; set them alike"
    ]
    if not settings.startswith("attempts"):
        alike = f"{text}[stages.train]\n{settings}\n"
        assert step(planned(alike), "compress").budget[0].max_loss == 0.02


@pytest.mark.parametrize(
    "value",
    [
        "3",
        "[]",
        "[{}]",
        "[3]",
        '{ bisect = "ratio", from = 0.9 }',
        '{ bisect = "ratio", from = 0.9, to = 0.9 }',
        '{ bisect = "ratio", from = 0.9, to = 0.1, probes = 1 }',
        '{ bisect = "ratio", from = 0.9, to = 0.1, probes = 2.5 }',
        '{ bisect = "ratio", from = 0.9, to = 0.1, prob = 3 }',
        '{ bisect = "ratio", from = true, to = 0.1 }',
    ],
)
def test_malformed_attempts_are_shown_both_forms(planned: Planned, value: str) -> None:
    (found,) = refused(planned, f'{TASK}[stages.compress]\nkind = "prune"\nattempts = {value}\n')
    assert found.startswith("spec.toml:6: stages.compress.attempts: expected a list of overrides such as [{ ratio")
    assert '{ bisect = "ratio", from = 0.9, to = 0.1, probes = 5 }' in found


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{ bisect = "ratioo", from = 0.9, to = 0.1 }', 'attempts.ratioo: unknown key; did you mean "ratio"?'),
        ('{ bisect = "ratio", from = 1.9, to = 0.1 }', "attempts.ratio: expected less than 1, got 1.9"),
        ("[{ ratio = 0.5 }, { ratio = 1.4 }]", "attempts.ratio: expected less than 1, got 1.4"),
        ("[{ ratio = 0.5 }, { procs = 2 }]", "attempts.procs: unknown key"),
    ],
)
def test_every_attempt_is_parsed_and_a_finding_told_once(planned: Planned, value: str, message: str) -> None:
    (found,) = refused(planned, f'{TASK}[stages.compress]\nkind = "prune"\nattempts = {value}\n')
    assert f"spec.toml:6: stages.compress.{message}" in found


def test_attempts_become_full_configs_that_differ_in_their_overrides_alone(planned: Planned) -> None:
    text = f'{TASK}[stages.compress]\nkind = "prune"\nsteps = 2\nattempts = [{{ ratio = 0.75 }}, {{ ratio = 0.5 }}]\n'
    bold, gentle = step(planned(text), "compress").attempts
    assert (bold.overrides, gentle.overrides) == ({"ratio": 0.75}, {"ratio": 0.5})
    assert differing(bold.config, gentle.config) == {"ratio": (0.75, 0.5)}
    assert bold.config["steps"] == 2
    assert bold.config["round_to"] == 16  # a default shows
    assert bold.code == gentle.code


def test_a_bisected_knob_of_a_nested_value_gives_configs_that_differ_only_there(planned: Planned) -> None:
    """`lr` is the training loop's, written flat beside the recipe's own settings and the stage's."""
    made = step(planned(f'{TASK}[stages.train]\nattempts = {{ bisect = "lr", from = 1, to = 0.125 }}\n'), "train")
    assert made.attempts == ()
    assert made.bisect is not None
    assert (made.bisect.boldest, made.bisect.gentlest, made.bisect.probes) == (1, 0.125, 5)
    bold, half = made.bisect.attempt(1), made.bisect.attempt(0.5625)
    assert bold.config == made.bisect.base.config
    assert differing(bold.config, half.config) == {"lr": (1.0, 0.5625)}
    assert half.overrides == {"lr": 0.5625}
    assert pages.stage("train").Config.model_validate(half.config).fit.lr == 0.5625


@pytest.mark.parametrize(
    ("stage", "kind", "knob", "ends", "expected"),
    [
        ("compress", "prune", "steps", ("5", "2"), 4),  # a number of steps is whole
        ("compress", "prune", "steps", ("5.0", "2"), 4),  # also where the spec writes it as 5.0
        ("train", "at", "lr", ("2", "1"), 1.5),  # and a learning rate is not, also where it is written as 2
    ],
)
def test_whole_is_what_the_field_holds_not_how_the_spec_writes_it(
    planned: Planned, stage: str, kind: str, knob: str, ends: tuple[str, str], expected: float
) -> None:
    attempts = f'{{ bisect = "{knob}", from = {ends[0]}, to = {ends[1]} }}'
    bisect = step(planned(f'{TASK}[stages.{stage}]\nkind = "{kind}"\nattempts = {attempts}\n'), stage).bisect
    assert bisect is not None
    middle = bisect.attempt((bisect.boldest + bisect.gentlest) / 2).config
    assert middle[knob] == expected
    assert pages.stage(stage).Config.model_validate(middle).model_dump(mode="json") == middle


def differing(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    assert one.keys() == other.keys()
    return {key: (one[key], other[key]) for key in one if one[key] != other[key]}


def test_what_the_spec_sets_is_not_overruled_by_the_targets_attempts(planned: Planned) -> None:
    assert [a.overrides for a in planned(TASK, "x86_cpu").steps[-1].attempts] == [
        {"precision": "int8"},
        {"precision": "int8_kept"},
        {"precision": "fp32"},
    ]
    (only,) = planned(f'{TASK}[stages.export]\nprecision = "fp32"\n', "x86_cpu").steps[-1].attempts
    assert (only.overrides, only.config["precision"]) == ({}, "fp32")
    untouched = planned(f"{TASK}[stages.export]\nruns = 50\n", "x86_cpu").steps[-1].attempts
    assert [a.config["runs"] for a in untouched] == [50, 50, 50]
    own = planned(f'{TASK}[stages.export]\nattempts = [{{ precision = "fp32" }}]\n', "x86_cpu").steps[-1].attempts
    assert [a.overrides for a in own] == [{"precision": "fp32"}]


def test_a_limit_of_the_spec_replaces_the_targets_on_the_same_metric(planned: Planned) -> None:
    page = {limit.metric: limit for limit in pages.target("x86_cpu").budget["export"]}
    own = '[[budget.export]]\nmetric = "size.model"\nat_most = 5\n'
    limits = {limit.metric: limit for limit in planned(TASK + own, "x86_cpu").steps[-1].budget}
    assert limits == {**page, "size.model": Limit(metric="size.model", at_most=5)}


def test_a_targets_cap_on_cost_reaches_a_searcher_and_the_specs_own_cap_wins(planned: Planned) -> None:
    search = f'{TASK}[stages.search]\nkind = "random_search"\n'
    config = planned(search, "iot").steps[0].attempts[0].config
    assert config["max_macs"] == 50_000_000
    assert planned(f"{search}max_macs = 7\n", "iot").steps[0].attempts[0].config["max_macs"] == 7


def test_a_distribution_that_a_target_needs_and_is_not_there_is_named(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Target(name="reference", summary="", needs=("onnxruntime", "no-such-runtime"))
    monkeypatch.setattr(pages, "target", lambda _: page)
    assert refused(planned, TASK) == [
        'target reference needs "no-such-runtime", which is not installed; `pip install no-such-runtime`'
    ]


def test_missing_data_are_bad_input_that_names_the_place(planned: Planned, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=f"task.data: {tmp_path}/data/.*does not exist"):
        planned('preset = "mnist"\n')


def test_a_plan_has_everything_a_run_needs(planned: Planned) -> None:
    made = planned(f"seed = 3\n{TASK}[stages.validate]\nsamples = 50\ntimeout_seconds = 60\nprocs = 2\n", "x86_cpu")
    assert tuple(one.name for one in made.steps) == ORDER
    assert [one.seed for one in made.steps] == [derive_seed(3, name) for name in ORDER]
    validate = step(made, "validate")
    assert (validate.timeout_seconds, validate.procs, validate.module) == (60, 2, "stages.validate")
    assert not {"timeout_seconds", "procs", "attempts"} & set(validate.attempts[0].config)
    assert validate.attempts[0].config["samples"] == 50
    assert made.spec.stages["export"]["runtime"] == "onnxruntime"  # of the target's page
    assert made.spec.target == "x86_cpu"
    assert {"torch", "numpy"} <= set(validate.libraries)
    assert Plan.load(json.loads(json.dumps(made.dump()))) == made
