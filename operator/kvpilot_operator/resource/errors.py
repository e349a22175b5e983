"""Faults of a manifest, one line each: field, value, what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from kvpilot_engine.contract import config_errors


class ManifestError(ValueError):
    """An invalid manifest. ``lines`` holds one sentence per fault."""

    def __init__(self, lines: Iterable[str], source: str = "") -> None:
        self.lines = tuple(lines)
        self.source = source
        prefix = f"{source}: " if source else ""
        super().__init__("\n".join(f"{prefix}{line}" for line in self.lines))


def manifest_errors(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per error; the line of an unknown field lists the known ones."""
    pairs = zip(config_errors(error), error.errors(), strict=True)
    return [_sentence(line, item, model) for line, item in pairs]


def _sentence(line: str, item: Mapping[str, Any], model: type[BaseModel]) -> str:
    if item["type"] == "extra_forbidden":
        return f"{line}; {_known_fields(model, item['loc'])}"
    if item["type"] == "value_error":
        where = ".".join(map(str, item["loc"])) or model.__name__
        scalar = not isinstance(item["input"], dict | list | BaseModel)
        got = f", got {item['input']!r}" if scalar else ""
        return f"{where}: {item['msg'].removeprefix('Value error, ')}{got}"
    return line


def _known_fields(model: type[BaseModel], location: tuple[int | str, ...]) -> str:
    owner = _model_at(model, location[:-1])
    if owner is None:
        return "not allowed here"
    names = [info.alias or name for name, info in owner.model_fields.items()]
    near = get_close_matches(str(location[-1]), names, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed: {', '.join(names)}"


def _model_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel] | None:
    found: type[BaseModel] | None = model
    for part in path:
        if found is None:
            return None
        if isinstance(part, int):
            continue
        annotation = next(
            (info.annotation for name, info in found.model_fields.items() if (info.alias or name) == part),
            None,
        )
        found = _inner_model(annotation)
    return found


def _inner_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _inner_model(arg))), None)
