"""Methods: frozen values with one verb. The folder is the registry.

In a method folder `base.py` is the contract, `_name.py` a helper, and every other file holds one method named like the
file. Listing names reads file names and imports nothing; naming one imports one file. Others add methods through an
entry point whose group is the folder's dotted name (`stages.attacks`) and whose name is that of the module.
"""

import difflib
import importlib
import inspect
from abc import ABC
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

T = TypeVar("T", bound="Method")


class InputError(ValueError):
    """What the user gave cannot be used; the text says what, where, expected, got and what to do next."""

    status = 2


class Value(BaseModel):
    """A frozen record that refuses unknown fields, NaN and infinity (as `pipeline/core/value.py`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def dump(self) -> dict[str, Any]:
        """Plain JSON data, defaults included; `load` turns it back into an equal value."""
        return self.model_dump(mode="json")

    @classmethod
    def load(cls, data: object) -> Self:
        """Raises pydantic's `ValidationError` where `data` does not fit."""
        return cls.model_validate(data)


class Method(Value, ABC):
    """A method and its settings in one frozen value; it holds no state. Its `kind` is the name of its file."""

    @property
    def kind(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    def dump(self) -> dict[str, Any]:
        return {"kind": self.kind, **super().dump()}


def names(folder: str) -> tuple[str, ...]:
    """The methods on offer in a folder such as `"stages.attacks"`, sorted; imports none of them."""
    found = {path.stem for path in _path(folder).glob("*.py") if path.stem != "base" and path.stem[0] != "_"}
    return tuple(sorted(found | {point.name for point in entry_points(group=folder)}))


def kinds(methods: Sequence[Method]) -> tuple[str, ...]:
    """The kind of each; from the second of one kind on with its number: pgd, pgd_2."""
    found: list[str] = []
    for number, method in enumerate(methods):
        count = sum(other.kind == method.kind for other in methods[:number])
        found.append(method.kind if count == 0 else f"{method.kind}_{count + 1}")
    return tuple(found)


def module_of(folder: str, kind: str) -> str:
    """The dotted name of the module that holds a method. Raises `InputError` with the nearest name."""
    if (_path(folder) / f"{kind}.py").is_file() and kind != "base" and kind[:1] != "_":
        return f"{folder}.{kind}"
    for point in entry_points(group=folder):
        if point.name == kind:
            return point.value.partition(":")[0]
    what = folder.rpartition(".")[2]
    close = difflib.get_close_matches(kind, names(folder), n=1)
    hint = f'did you mean "{close[0]}"?' if close else f"there is {', '.join(names(folder))}"
    raise InputError(f'no method "{kind}" in {what}; {hint}')


def load(folder: str, base: type[T], data: object) -> T:
    """A method from `"pgd"` or `{"kind": "pgd", "steps": 20}`; a method passes through."""
    if isinstance(data, base):
        return data
    if isinstance(data, str):
        data = {"kind": data}
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise InputError(f'expected a name or a table with "kind", got {data!r}; there is {", ".join(names(folder))}')
    method = type_of(folder, base, data["kind"])
    try:
        return method.load({key: value for key, value in data.items() if key != "kind"})
    except ValidationError as error:
        raise _hinted(error, method) from None


def unknown(key: str, valid: Iterable[str]) -> str:
    """`unknown key; did you mean "epochs"?`, or all valid keys where none is close."""
    names = sorted(valid)
    close = difflib.get_close_matches(key, names, n=1)
    if close:
        return f'unknown key; did you mean "{close[0]}"?'
    return f"unknown key; there is {', '.join(names)}" if names else "unknown key"


def finding(place: tuple[Any, ...], text: str) -> InitErrorDetails:
    """A sentence at a place, for `ValidationError.from_exception_data`."""
    literal: Any = text  # typed as a literal in pydantic; without a context the text is taken as it is
    return InitErrorDetails(type=PydanticCustomError("section", literal), loc=place, input={})


def _hinted(error: ValidationError, method: type[Method]) -> ValidationError:
    """The same findings; a setting that the method does not have is answered with the nearest that it has."""
    details: list[Any] = []
    for detail in error.errors(include_url=False):
        place = detail["loc"]
        if detail["type"] == "extra_forbidden":
            details.append(finding(place, unknown(str(place[-1]), _fields_at(method, place[:-1]))))
        else:
            text = detail["msg"].removeprefix("Value error, ")
            details.append({**finding(detail["loc"], text), "input": detail["input"]})
    return ValidationError.from_exception_data(method.__name__, details)


def _fields_at(model: Any, place: tuple[Any, ...]) -> Iterable[str]:
    """The settings of a method, or of the frozen value that one of its settings is, as far as annotations tell."""
    for part in place:
        field = getattr(model, "model_fields", {}).get(part)
        model = None if field is None else field.annotation
    fields: Mapping[str, Any] = getattr(model, "model_fields", {})
    return fields


def type_of(folder: str, base: type[T], kind: str) -> type[T]:
    """The class behind a name, imported. Raises `InputError` with the nearest name."""
    return _only_method(importlib.import_module(module_of(folder, kind)), base)


def polymorphic(folder: str, base: type[Method]) -> tuple[BeforeValidator, PlainSerializer]:
    """The annotations that make a pydantic field of type `base` load by kind and dump every field of its subclass.

    Without them a field annotated with the abstract base drops the subclass's fields when dumped, and two different
    attacks would share a cache key.
    """
    return (
        BeforeValidator(lambda data: load(folder, base, data)),
        PlainSerializer(lambda method: method.dump(), return_type=dict[str, Any]),
    )


def _only_method(module: ModuleType, base: type[T]) -> type[T]:
    own = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
    ]
    if len(own) != 1:
        raise InputError(f"{module.__name__}: expected exactly one {base.__name__}, got {len(own)}")
    return own[0]


def _path(folder: str) -> Path:
    # Not importlib.util.find_spec: that would import the parent packages, and listing must stay free of torch.
    return Path(__file__).resolve().parent.joinpath(*folder.split(".")[1:])
