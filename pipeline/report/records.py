"""Reading a record that this program, an older one or somebody else wrote."""

import base64
import json
from pathlib import Path

from pydantic import ValidationError

from pipeline.core.errors import BadInput
from pipeline.core.record import SCHEMA, Outcomes, RunRecord


def read_record(path: Path, what: str = "record") -> RunRecord:
    """The record in a JSON file; `what` names it in messages.

    Raises `BadInput` naming the file: not there, not readable, not JSON, not a record, or written by a newer version.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: expected a {what} here, there is none; a build writes one as record.json") from None
    except OSError as error:
        raise BadInput(f"{path}: the {what} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BadInput(f"{path}: the {what} is not JSON ({error}); copy it again or build anew") from None
    version = data.get("schema_version", SCHEMA) if isinstance(data, dict) else SCHEMA
    if isinstance(version, int) and version > SCHEMA:
        raise BadInput(
            f"{path}: the {what} has schema version {version}, this program reads up to {SCHEMA}; "
            "install the newer version that wrote it"
        )
    try:
        record = RunRecord.load(data)
    except ValidationError as error:
        raise BadInput(f"{path}: not a {what} of a run: {_first(error)}; expected the record.json of a build") from None
    for stage in record.stages:
        for metric, outcomes in stage.outcomes.items():
            if not _readable(outcomes):
                raise BadInput(
                    f"{path}: stage {stage.name}, outcomes of {metric}: expected {outcomes.count} bits in base64, "
                    f"got {len(outcomes.bits)} characters that do not hold them; copy the {what} again"
                )
    return record


def _readable(outcomes: Outcomes) -> bool:
    try:
        return len(base64.b64decode(outcomes.bits, validate=True)) == (outcomes.count + 7) // 8
    except ValueError:
        return False


def _first(error: ValidationError) -> str:
    """The first finding, with its place, and how many more there are."""
    finding = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in finding["loc"]) or "top level"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {finding['msg']}{more}"
