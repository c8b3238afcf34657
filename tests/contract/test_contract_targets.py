"""Every page in targets/ is a device: data that a plan can read, passes that exist, demands for the gate."""

from importlib import import_module
from pathlib import Path

import pytest

import targets
from pipeline.core.measurement import fraction
from pipeline.core.target import Target
from targets.lowering.apply import apply, check_passes, passes_for, prove
from targets.passes.base import Kit
from tests.graphs import images, tiny

PAGES = sorted(p.stem for p in Path(targets.__file__).parent.glob("*.py") if p.stem != "__init__")
PRECISIONS = {"fp32", "fp16", "int8", "int8_kept"}


def page(name: str) -> Target:
    found = import_module(f"targets.{name}").TARGET
    assert isinstance(found, Target)
    return found


def test_the_promised_devices_are_there() -> None:
    assert PAGES == ["cuda", "iot", "jetson", "raspberry_pi", "reference", "x86_cpu"]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_named_like_its_file_and_survives_json(name: str) -> None:
    target = page(name)
    assert target.name == name
    assert target.summary
    assert Target.load(target.dump()) == target
    assert "\n" not in target.summary


@pytest.mark.parametrize("name", PAGES)
def test_every_precision_names_passes_that_exist_and_every_attempt_a_precision(name: str) -> None:
    section = page(name).sections["export"]
    for passes in section["precisions"].values():
        check_passes(passes)
    assert set(section["precisions"]) <= PRECISIONS
    for attempt in section["attempts"]:
        assert list(attempt) == ["precision"]
        passes_for(section["precisions"], attempt["precision"])
    assert section["runtime"] in ("onnxruntime", "tensorrt")


@pytest.mark.parametrize("name", PAGES)
def test_the_gate_holds_size_latency_and_memory(name: str) -> None:
    limits = page(name).budget["export"]
    assert {"size.model", "latency.p95", "memory.peak"} <= {limit.metric for limit in limits}


@pytest.mark.parametrize("name", PAGES)
def test_a_limit_on_a_share_is_within_reach_of_a_small_hold_out(name: str) -> None:
    """Of Wilson's interval the low end counts: with few images even a perfect share does not reach 0.97."""
    perfect = fraction("parity.top1", 35, 35)
    for limit in page(name).budget["export"]:
        if limit.at_least is not None and limit.metric.startswith(("parity.top1", "accuracy.")):
            assert perfect.low >= limit.at_least, limit
            assert fraction(limit.metric, 34, 34).low < limit.at_least  # the number that the page names


@pytest.mark.parametrize("name", PAGES)
def test_only_the_export_section_is_set_so_that_devices_share_the_other_stages(name: str) -> None:
    assert set(page(name).sections) == {"export"}


@pytest.mark.parametrize("name", PAGES)
def test_a_device_that_is_not_this_machine_owes_its_speed(name: str) -> None:
    target = page(name)
    speed = [limit for limit in target.budget["export"] if limit.metric == "latency.p95"]
    assert all(limit.on_device == ("machine" in target.sections["export"]) for limit in speed)


@pytest.mark.parametrize("name", PAGES)
def test_every_precision_on_offer_can_be_lowered_to(name: str, tmp_path: Path) -> None:
    precisions = page(name).sections["export"]["precisions"]
    made = prove(tiny(), precisions, Kit(images(64), tmp_path))
    for precision, lowered in made.items():
        assert lowered.parity.gap <= 0.1 * lowered.parity.scale
        if precision == "fp32":
            assert lowered.parity.gap <= 1e-5 * lowered.parity.scale


@pytest.mark.parametrize("name", ["cuda", "jetson"])
def test_nvidias_parser_and_builder_take_every_precision(name: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="the rtx extra is not installed")
    section = page(name).sections["export"]
    for precision, passes in section["precisions"].items():
        assert passes[-1] == "tensorrt_check"
        said: list[str] = []
        apply(tiny(), passes, Kit(images(32), tmp_path, note=said.append))
        assert len(said) == 1, precision
        assert "takes the graph" in said[0]


@pytest.mark.parametrize("name", ["raspberry_pi", "iot"])
def test_small_boards_get_an_ort_file(name: str, tmp_path: Path) -> None:
    passes = passes_for(page(name).sections["export"]["precisions"], "int8")
    lowered = apply(tiny(), passes, Kit(images(32), tmp_path))
    assert lowered.extras[".ort"][4:8] == b"ORTM"
