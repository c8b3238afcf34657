"""Flat sections: a stage's part of the spec names a method and holds its settings side by side with the stage's own."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from stages.method import InputError, Method, Value, finding, type_of, unknown


class Section(Value):
    """The base of a stage's `Config` whose section in the spec is flat.

        [stages.train]                      class Config(Section):
        kind = "trades"                         METHOD = ("recipe", "stages.recipes", Recipe)
        beta = 6         # of the recipe        FLAT = ("fit",)
        epochs = 30      # of the loop          recipe: AnyRecipe = AdversarialTraining()
        keep = "best"    # of the stage         fit: Fit = Fit()
                                                keep: Literal["last", "best"] = "last"

    `METHOD` is (field, folder, base class) of the one method that `kind` and the keys of its own settings go to;
    without `kind` the field's default names it. `FLAT` lists fields that are values whose keys lie in the section too.
    A key goes to the stage, else to the method, else to a flat value; contract tests keep these names apart. In code
    they are ordinary fields (`config.recipe`, `Config(recipe=..., fit=...)`), and tables nested that way load as well.

    `dump` is flat and shows every default; loading it gives an equal value. Every finding of a section comes in one
    `ValidationError` whose places are the user's keys; an unknown key gets the nearest valid one.
    """

    METHOD: ClassVar[tuple[str, str, type[Method]] | None] = None
    FLAT: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="wrap")
    @classmethod
    def _split(cls, data: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        nested, findings = _nest(cls, data)
        try:
            made = handler(nested)
        except ValidationError as error:
            findings += [_at_user_key(cls, data, detail) for detail in error.errors(include_url=False)]
        if findings:
            raise ValidationError.from_exception_data(cls.__name__, findings)
        return made

    @model_serializer(mode="wrap")
    def _flatten(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        nested: dict[str, Any] = handler(self)
        inner = _embedded(type(self))
        flat = {key: value for field in inner for key, value in nested[field].items()}
        return {**flat, **{key: value for key, value in nested.items() if key not in inner}}


def _embedded(cls: type[Section]) -> tuple[str, ...]:
    return ((cls.METHOD[0],) if cls.METHOD else ()) + cls.FLAT


def _nest(cls: type[Section], data: Mapping[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """The flat table as one table per field, and findings about keys that belong nowhere."""
    inner = _embedded(cls)
    homes = {key: field for field in cls.FLAT for key in _model(cls, field).model_fields}
    nested: dict[str, Any] = {k: dict(v) if k in inner and isinstance(v, Mapping) else v for k, v in data.items()}
    nested = {key: value for key, value in nested.items() if key in cls.model_fields}
    findings: list[InitErrorDetails] = []
    flat = [key for key in data if key not in cls.model_fields]
    named = True
    if cls.METHOD is not None and cls.METHOD[0] not in data:
        field, folder, base = cls.METHOD
        default = cls.model_fields[field].default
        kind = data.get("kind", default.kind if isinstance(default, Method) else None)
        flat = [key for key in flat if key != "kind"]
        try:
            homes = {**homes, **dict.fromkeys(_method(folder, base, kind).model_fields, field)}
            nested[field] = {"kind": kind}
        except InputError as error:
            named = False  # nobody knows which keys are the method's own, so only the name is found fault with
            findings.append(finding(("kind",), str(error)))
    for key in flat:
        home = nested.setdefault(homes[key], {}) if key in homes else None
        if isinstance(home, dict) and key not in home:
            home[key] = data[key]
        elif key in homes:
            findings.append(finding((key,), f'given twice, here and in "{homes[key]}"'))
        elif named:
            valid = [*homes, *(k for k in cls.model_fields if k not in inner), *(("kind",) if cls.METHOD else ())]
            findings.append(finding((key,), unknown(key, valid)))
    return nested, findings


def _method(folder: str, base: type[Method], kind: object) -> type[Method]:
    if not isinstance(kind, str):
        raise InputError(f"expected the name of a method, got {kind!r}")
    return type_of(folder, base, kind)


def _at_user_key(cls: type[Section], data: Mapping[str, Any], detail: Any) -> InitErrorDetails:
    """One of pydantic's findings on the nested table, at the place where the user wrote it."""
    loc: tuple[Any, ...] = detail["loc"]
    place = loc[1:] if loc and loc[0] in _embedded(cls) and loc[0] not in data else loc
    if detail["type"] == "extra_forbidden":
        return finding(place, unknown(str(loc[-1]), _fields_at(cls, loc[:-1])))
    text = detail["msg"].removeprefix("Value error, ")
    return {**finding(place, text), "input": detail["input"]}


def _fields_at(cls: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    """The keys that are valid at a place, as far as annotations tell."""
    model: Any = cls
    for part in loc:
        field = model.model_fields.get(part) if _is_model(model) else None
        model = None if field is None else field.annotation
    return list(model.model_fields) if _is_model(model) else []


def _model(cls: type[Section], field: str) -> type[BaseModel]:
    found = cls.model_fields[field].annotation
    if not _is_model(found):
        raise TypeError(f"{cls.__module__}.{field}: expected a frozen value as annotation, got {found}")
    return found  # type: ignore[return-value]  # narrowed by _is_model


def _is_model(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, BaseModel)
