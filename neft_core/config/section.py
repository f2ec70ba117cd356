"""What every section of params.yaml is: a mapping with known keys, each fault told in a line."""

import difflib
import re
from collections.abc import Collection
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

NO_FILE: Final = "data/none"
"""An empty file in every workspace: DVC needs a path to watch, and some sources have none."""

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,99}")
"""Names of tasks and runs: a dot would be a level of keys to DVC; files are called by them."""


Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What random numbers begin with; more bits than these no generator here takes."""


def refuse(message: str) -> PydanticCustomError:
    """An error whose text is shown as it is (braces in pydantic's templates need doubling)."""
    return PydanticCustomError("neft", message.replace("{", "{{").replace("}", "}}"))


def _on_disk(path: str) -> str:
    if "://" in path:
        raise refuse(f"got '{path}'; a path on this machine, where a copy lies")
    return path


Place = Annotated[str, Field(min_length=1), AfterValidator(_on_disk)]
"""A file or directory, relative to the workspace or absolute."""


class Section(BaseModel):
    """A mapping of params.yaml: unknown keys are refused, values keep their YAML type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _nearest_keys(cls, data: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        """Tell for each unknown key which one may be meant; other faults stay as they are."""
        try:
            return check(data)
        except ValidationError as fault:
            errors: list[InitErrorDetails] = []
            for error in fault.errors(include_url=False):
                kind: str | PydanticCustomError = error["type"]
                if kind == "extra_forbidden" and len(error["loc"]) == 1:
                    kind = _unknown(str(error["loc"][0]), list(cls.model_fields))
                elif kind == "neft":
                    kind = refuse(error["msg"])
                errors.append(
                    InitErrorDetails(
                        type=kind, loc=error["loc"], input=error["input"], ctx=error.get("ctx", {})
                    )
                )
            raise ValidationError.from_exception_data(cls.__name__, errors) from None


def _unknown(key: str, known: list[str]) -> PydanticCustomError:
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
    return refuse(f"unknown key; {hint}")


def known(where: str, name: str, names: Collection[str]) -> None:
    """Refuse a name that isn't one of those, with the nearest."""
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names) or 'none'}"
        raise refuse(f"{where}: got '{name}'; {hint}")
