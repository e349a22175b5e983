"""The metrics sources that the owner of the operator configured. A resource names one and gives no URL."""

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
    """An invalid sources file: one line per fault."""


@dataclass(frozen=True)
class Source:
    """One Prometheus, or a server with its API.

    Attributes:
        scrape_interval: of the engines' pods, s, as configured in the source.
        token_file: holds the bearer token; read again for each request, as tokens rotate.
        ca_file: certificate authorities; "" for the system's.
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


def source_of(name: str, url: str, token_file: str = "", ca_file: str = "") -> Source:
    """One source that is given on a command line.

    Raises:
        pydantic.ValidationError: the URL is invalid.
    """
    given = _Source.model_validate({"url": url, "tokenFile": token_file, "caFile": ca_file})
    return Source(name=name, **given.model_dump())


def load_sources(path: Path) -> Mapping[str, Source]:
    """Read the sources file. A missing ``default`` is no fault; resources that use it report it.

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
