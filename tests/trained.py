"""Small networks trained for seconds on the embedded digits, once per test run."""

from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from stages.fitting.optim import Fit
from stages.method import load
from stages.nn.arch import Arch, Model
from stages.recipes.base import FOLDER, Recipe
from stages.task import Splits, Task, statistics
from stages.tuning import initial, tune

TASK: dict[str, Any] = {"data": {"kind": "digits"}, "threat": {"norm": "linf", "eps": 0.1}}


@cache
def digits() -> Splits:
    return Task.load(TASK).open(Path())


@cache
def digits_model(builder: str = "small_cnn", recipe: str = "natural", epochs: int = 6, width: int = 16) -> Model:
    """A network of the given builder, trained under a recipe at linf 0.1."""
    splits = digits()
    mean, std = statistics(splits.train)
    arch = Arch(
        builder=builder,
        options={"width": width},
        input_shape=splits.input_shape,
        classes=len(splits.classes),
        mean=mean,
        std=std,
    )
    settings: dict[str, Any] = {"kind": recipe, **({"steps": 5} if recipe == "at" else {})}
    method = load(FOLDER, Recipe, settings)  # type: ignore[type-abstract]
    threat = Task.load(TASK).threat
    config = Fit.load({"epochs": epochs, "batch": 64, "lr": 0.05})
    net: nn.Module = tune(initial(arch, 0), method, config, splits.train, threat, 0)
    return Model(arch, net.eval())
