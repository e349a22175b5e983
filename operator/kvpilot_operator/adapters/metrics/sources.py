"""The sources of metrics that the operator's owner configured. Resources name one; they never give a URL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from kvpilot_engine.contract import config_errors

_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)?")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class SourcesError(ValueError):
    """A sources file that cannot be used: one line per fault."""


@dataclass(frozen=True)
class Source:
    """One Prometheus, or anything that answers as one.

    Attributes:
        scrape_interval: of the engines' pods, s; it is configured there, and repeated here.
        token_file: holds the bearer token; read again for each request, as tokens rotate.
        ca_file: certificates that its own must be signed by; "" for the system's.
    """

    name: str
    url: str
    scrape_interval: float = 15.0
    token_file: str = ""
    ca_file: str = ""


def _seconds(value: Any) -> Any:
    """``15s``, ``500ms``, ``1m`` or a number of seconds."""
    if isinstance(value, str) and (match := _DURATION.fullmatch(value)):
        return float(match[1]) * _SECONDS[match[2]]
    return value


def _http_url(value: str) -> str:
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", value):
        raise ValueError("must be an http:// or https:// URL")
    return value.rstrip("/")


class _Source(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)

    url: Annotated[str, AfterValidator(_http_url)]
    scrape_interval: Annotated[float, BeforeValidator(_seconds)] = Field(15.0, gt=0, le=600)
    token_file: str = ""
    ca_file: str = ""


class _Sources(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sources: dict[str, _Source] = Field(min_length=1)


def load_sources(path: Path) -> Mapping[str, Source]:
    """Read the sources file; a missing ``default`` is no fault, but its resources will say so.

    Raises:
        SourcesError: naming the file and each fault.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SourcesError(f"{path}: cannot be read: {error}") from error
    try:
        given = _Sources.model_validate(document).sources
    except ValidationError as error:
        raise SourcesError("\n".join(f"{path}: {line}" for line in config_errors(error))) from error
    return {name: Source(name=name, **source.model_dump()) for name, source in given.items()}
