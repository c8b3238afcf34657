"""The frozen, closed base of everything that is written to JSON."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Value(BaseModel):
    """A frozen record that refuses unknown fields, NaN and infinity.

    `stages/method.py` repeats these lines, because the libraries there import nothing of `pipeline`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def dump(self) -> dict[str, Any]:
        """Plain JSON data, defaults included; `load` turns it back into an equal value."""
        return self.model_dump(mode="json")

    @classmethod
    def load(cls, data: object) -> Self:
        """Raises pydantic's `ValidationError` where `data` does not fit."""
        return cls.model_validate(data)
