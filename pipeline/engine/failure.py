"""What went wrong inside a stage, as data: in which exit status it ends, one line for the user, the rest for a file."""

import traceback
from typing import Literal

from pipeline.core.errors import BadInput, StageFailed, TemperError
from pipeline.core.value import Value
from pipeline.engine.disk import disk_refused, refusal

# Named, not imported: the engine knows no stages. Their own errors for what a user gave all derive from this one.
_USER_ERROR = ("stages.method", "InputError")


class Failure(Value):
    """`details` is a traceback; "input" is the user's to mend (exit 2), "stage" is not (exit 3)."""

    blame: Literal["input", "stage"]
    text: str
    details: str

    def error(self, stage: str, where: str) -> TemperError:
        """The exception to end the build with; `where` is the file that holds the details."""
        if self.blame == "input":
            return BadInput(f"{stage}: {self.text}")
        return StageFailed(f"{stage} failed: {self.text}; details in {where}")


def failure_of(error: BaseException) -> Failure:
    """Sort an exception of a stage: the user's input, the disk, or a fault."""
    details = "".join(traceback.format_exception(error))
    kinds = {(kind.__module__, kind.__qualname__) for kind in type(error).__mro__}
    if _USER_ERROR in kinds or isinstance(error, BadInput):
        return Failure(blame="input", text=str(error), details=details)
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in _OURS:
        text = f'needs "{error.name}", which is not installed; `pip install "temper-edge[build,cpu]"`'
        return Failure(blame="input", text=text, details=details)
    if (disk := disk_refused(error)) is not None:
        return Failure(blame="input", text=refusal(disk), details=details)
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if lines and isinstance(error, TemperError):
        text = lines[0]  # ours are written as sentences
    return Failure(blame="stage", text=text, details=details)


_OURS = ("", "pipeline", "stages", "targets")
