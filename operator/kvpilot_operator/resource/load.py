"""Reads YAML or a plain object into the models."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import KVCacheDeployment


class _StrictLoader(yaml.SafeLoader):
    """Refuses a duplicate key, of which YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be plain text; is a {{ placeholder }} left?", key.start_mark
                )
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_manifest(source: str | Path) -> KVCacheDeployment:
    """Read one KVCacheDeployment from YAML text or from a file.

    Raises:
        ManifestError: one line per fault, each naming field, value and what is allowed.
    """
    return KVCacheDeployment.parse(load_document(source), str(source) if isinstance(source, Path) else "")


def load_document(source: str | Path) -> dict[str, Any]:
    """The one YAML document in text or in a file, not validated.

    Raises:
        ManifestError: no such file, not YAML, or not exactly one document.
    """
    name = str(source) if isinstance(source, Path) else ""
    text = _read(source) if isinstance(source, Path) else source
    try:
        documents = [item for item in yaml.load_all(text, Loader=_StrictLoader) if item is not None]
    except yaml.YAMLError as error:
        raise ManifestError([_syntax(error)], name) from None
    if len(documents) != 1:
        count = "no document" if not documents else f"{len(documents)} documents"
        raise ManifestError([f"{count}; exactly one object is expected"], name)
    if not isinstance(documents[0], dict):
        raise ManifestError([f"a mapping is expected, got {type(documents[0]).__name__}"], name)
    return documents[0]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ManifestError([f"cannot be read: {reason}"], str(path)) from None


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"not valid YAML: {where}{getattr(error, 'problem', None) or error}"
