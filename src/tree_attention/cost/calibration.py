"""A machine's constants as measured there, in a file: what `tree-attention calibrate` writes and `plan` takes."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from .machine import Gpu, Link, Machine

Part = TypeVar("Part", Gpu, Link)


@dataclass(frozen=True)
class Calibration:
    """machine: the constants; hardware: what they were measured on; date: ISO 8601."""

    machine: Machine
    hardware: str
    date: str


def save_calibration(calibration: Calibration, file: Path) -> None:
    """Write it as JSON."""
    file.write_text(json.dumps(asdict(calibration), indent=2) + "\n", encoding="utf-8")


def load_calibration(file: Path) -> Calibration:
    """Read what `save_calibration` wrote.

    Raises ValueError for a file that cannot be read, or holds anything else: fields missing or too many, numbers that
    are not positive.
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
        machine = Machine(
            str(parts["name"]), _part(Gpu, parts["gpu"]), _part(Link, parts["inside"]), _part(Link, parts["across"]),
            per_node,
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"machine {file} is no calibration: {error}; tree-attention calibrate writes one") from None
    return Calibration(machine, str(about["hardware"]), str(about["date"]))


def _part(kind: type[Part], document: Any) -> Part:
    """A Gpu or a Link, its numbers positive."""
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
