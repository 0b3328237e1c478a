"""The file of measured machine constants that `tree-attention calibrate` writes and `plan --machine` reads."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .machine import GpuSpec, LinkSpec, Machine

Part = TypeVar("Part", GpuSpec, LinkSpec)


@dataclass(frozen=True)
class Calibration:
    """Measured constants. hardware: the machine they were measured on. date: ISO 8601."""

    machine: Machine
    hardware: str
    date: str


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write `calibration` to `file` as JSON."""
    file.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")


def load_calibration(file: Path) -> Calibration:
    """Read a file that `save_calibration` wrote.

    Raises ValueError if the file cannot be read, a field is missing or unknown, or a number is not positive.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"machine {file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"machine {file} must be a JSON document: {error}") from None
    try:
        about = _fields(Calibration, document)
        parts = _fields(Machine, about["machine"])
        per_node = parts["per_node"]
        if not isinstance(per_node, int) or per_node < 1:
            raise ValueError(f"per_node must be at least 1, got {per_node!r}")
        inside, across = (_part(LinkSpec, parts[name]) for name in ("inside", "across"))
        machine = Machine(str(parts["name"]), _part(GpuSpec, parts["gpu"]), inside, across, per_node)
    except ValueError as error:
        raise ValueError(
            f"machine {file} is not a calibration: {error}. Create one with: tree-attention calibrate"
        ) from None
    return Calibration(machine, str(about["hardware"]), str(about["date"]))


def _part(kind: type[Part], document: Any) -> Part:
    """Return a GpuSpec or LinkSpec after checking that its numbers are positive."""
    parts = _fields(kind, document)
    for name, value in parts.items():
        if name == "peer_access":
            if not isinstance(value, bool):
                raise ValueError(f"{name} must be true or false, got {value!r}")
        elif name not in ("name", "source"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
    return kind(**parts)


def _fields(kind: type, document: Any) -> dict[str, Any]:
    wanted = [field.name for field in fields(kind)]
    if not isinstance(document, dict) or sorted(document) != sorted(wanted):
        there = sorted(document) if isinstance(document, dict) else type(document).__name__
        raise ValueError(f"{kind.__name__} must have {', '.join(wanted)}, got {there}")
    return document
