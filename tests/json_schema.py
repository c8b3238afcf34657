"""JSON Schema, in the part of it that our own documents use."""

import re
from collections.abc import Mapping
from typing import Any


def fits(data: Any, schema: Mapping[str, Any], root: Mapping[str, Any], where: str = "$") -> list[str]:
    """What of `data` breaks the schema, in the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        return fits(data, root["$defs"][schema["$ref"].rpartition("/")[2]], root, where)
    if "anyOf" in schema:
        tries = [fits(data, one, root, where) for one in schema["anyOf"]]
        return [] if [] in tries else tries[0]
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    kinds |= {"integer": int, "number": (int, float)}  # type: ignore[dict-item]
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    of_kind = any(isinstance(data, kinds[k]) and (k == "boolean" or not isinstance(data, bool)) for k in wanted)
    problems = [] if of_kind or not wanted else [f"{where}: {data!r} is no {wanted}"]
    if "enum" in schema and data not in schema["enum"]:
        problems.append(f"{where}: {data!r} is none of {schema['enum']}")
    if "const" in schema and data != schema["const"]:
        problems.append(f"{where}: {data!r} is not {schema['const']!r}")
    if isinstance(data, str) and not re.search(schema.get("pattern", ""), data):
        problems.append(f"{where}: {data!r} does not match {schema['pattern']}")
    if isinstance(data, int | float) and not schema.get("minimum", data) <= data <= schema.get("maximum", data):
        problems.append(f"{where}: {data} is out of range")
    if isinstance(data, list):
        problems += [] if len(data) >= schema.get("minItems", 0) else [f"{where}: too few"]
        for number, entry in enumerate(data):
            problems += fits(entry, schema.get("items", {}), root, f"{where}[{number}]")
    if isinstance(data, dict):
        known = schema.get("properties", {})
        problems += [f"{where}: no {name}" for name in schema.get("required", ()) if name not in data]
        if schema.get("additionalProperties") is False:
            problems += [f"{where}: unknown {name}" for name in data if name not in known]
        for name, entry in data.items():
            problems += fits(entry, known.get(name, {}), root, f"{where}.{name}")
    return problems
