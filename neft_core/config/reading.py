"""params.yaml read from a file, and its faults told in one line each."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from neft_core.config.params import Params
from neft_core.config.section import Section
from neft_core.errors import NeftError

Checked = TypeVar("Checked", bound=Section)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML 1.2 mapping by the safe loader.

    Raises:
        NeftError: the file is missing, is not UTF-8 YAML, or holds no mapping.
    """
    try:
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NeftError(f"{path}: not found; run 'neft init DIR' to make a workspace") from None
    except OSError as fault:
        raise NeftError(f"{path}: {fault.strerror}; give a file that can be read") from None
    except (YAMLError, ValueError) as fault:  # ValueError: also a date or a number that is none
        line = getattr(getattr(fault, "problem_mark", None), "line", None)
        at = "" if line is None else f"line {line + 1}: "
        plain = "not UTF-8 text" if isinstance(fault, UnicodeDecodeError) else str(fault)
        what = getattr(fault, "problem", None) or plain
        raise NeftError(f"{path}: {at}{what}; mend the YAML") from None
    if not isinstance(data, dict):
        raise NeftError(f"{path}: holds no mapping; see the README for its sections")
    for key in data:
        if not isinstance(key, str):
            raise NeftError(f"{path}: {key!r} is no text; names of sections are")
    return data


def parse_params(data: dict[str, Any], where: str) -> Params:
    """Check a params mapping whole (see `check_section`)."""
    return check_section(Params, data, where)


def check_section(kind: type[Checked], data: dict[str, Any], where: str) -> Checked:
    """Check a mapping.

    Args:
        kind: what it shall be.
        data: what the YAML file holds.
        where: the file's name, for messages.

    Raises:
        NeftError: one line for each fault, naming file, key, value and what is allowed.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as fault:
        lines = _lines(fault.errors(include_url=False), data)
        raise NeftError("\n".join(f"{where}: {line}" for line in lines)) from None


def yaml_text(data: dict[str, Any]) -> str:
    """A mapping as YAML, in its order."""
    out = io.StringIO()
    yaml: Any = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.width = 4096
    # What stands in two places is written twice: others read this file too.
    yaml.representer.ignore_aliases = lambda _: True
    yaml.dump(data, out)
    return out.getvalue()


def load_params(path: Path) -> Params:
    """Read and check a params file (see `read_yaml`, `parse_params`)."""
    return parse_params(read_yaml(path), path.name)


def _lines(errors: Sequence[Any], data: Any) -> dict[str, None]:
    """A line for each fault; where one of several types would do, one for all of them."""
    found = [(_place(e, data)[0], e["type"] in _TYPES, _describe(e, data)) for e in errors]
    lines: dict[str, None] = {}
    for where, of_type, line in found:
        # What a value's own form lacks says more than that it has not the other form.
        inside = any(w.startswith(f"{where}.") or (w == where and not t) for w, t, _ in found)
        if of_type and inside:
            continue
        same = dict.fromkeys(told.rpartition("; ")[2] for w, _, told in found if w == where)
        if of_type and len(same) > 1:
            wanted = [text.removesuffix(" is needed") for text in same]
            line = f"{line.rpartition('; ')[0]}; {' or '.join(wanted)} is needed"
        lines[line] = None
    return lines


def _place(error: Any, data: Any) -> tuple[str, Any]:
    """Keys of a pydantic error, and the value there."""
    keys: list[str] = []
    last = len(error["loc"]) - 1
    for position, part in enumerate(error["loc"]):
        # The tag of a union stands in the location, but not in the file.
        if isinstance(data, dict) and part not in data and position != last:
            continue
        if isinstance(data, dict) and part not in data and error["type"] != "missing":
            continue
        if not isinstance(data, dict | list) or (isinstance(data, list) and isinstance(part, str)):
            continue
        keys.append(str(part))
        if isinstance(data, dict):
            data = data.get(part)
        elif part < len(data):
            data = data[part]
    return ".".join(keys), data


def _describe(error: Any, data: Any) -> str:
    """`runs.neft.method.percent: got 140; at most 100` of one pydantic error."""
    where, data = _place(error, data)
    kind, context, message = error["type"], error.get("ctx", {}), error["msg"]
    if kind == "neft":
        # A message that names its own key continues the path ("budget: got none").
        joint = "." if where and re.match(r"[a-z_.]+: ", message) else ": "
        return f"{where}{joint}{message}" if where else message
    if kind == "missing":
        return f"{where}: missing; it is required"
    if kind.startswith("union_tag"):
        tag = str(context.get("discriminator", "")).strip("'")
        allowed = str(context.get("expected_tags", "")).replace("'", "")
        if kind == "union_tag_not_found":
            return f"{where}.{tag}: missing; it is required"
        return f"{where}.{tag}: got '{context.get('tag')}'; allowed are {allowed}"
    if error["loc"][-1] == "[key]":
        return f"{where}: got a name that is no text; put it in quotes"
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = [(text, context[key]) for key, text in bounds.items() if key in context]
    limits = [f"{text} {n if isinstance(n, int) else f'{n:g}'}" for text, n in found]
    if kind == "literal_error":
        limits = [f"allowed are {context['expected']}".replace("'", "").replace(" or ", ", ")]
    if kind in ("too_short", "too_long"):
        few = kind == "too_short"
        number = context["min_length" if few else "max_length"]
        limits = [f"at {'least' if few else 'most'} {number} of them"]
    allowed = limits[0] if limits else _NEEDED.get(kind, message[0].lower() + message[1:])
    return f"{where}: got {_as_yaml(data)}; {allowed}"


_NEEDED = {
    "int_type": "a whole number is needed",
    "float_type": "a number is needed",
    "finite_number": "a finite number is needed",
    "bool_type": "true or false is needed",
    "string_type": "text is needed",
    "string_too_short": "text is needed",
    "list_type": "a list is needed",
    "dict_type": "a mapping of keys is needed",
    "model_type": "a mapping of keys is needed",
    "model_attributes_type": "a mapping of keys is needed",
}
"""What the types of pydantic's errors ask for."""

_TYPES = [kind for kind in _NEEDED if kind.endswith("_type")]


def _as_yaml(value: Any) -> str:
    """A value as the user wrote it: `true`, not `True`."""
    return (
        {True: "true", False: "false"}[value]
        if isinstance(value, bool)
        else ("nothing" if value is None else repr(value))
    )
