"""Convert a pydantic model to the structural schema that an API server accepts.

A CustomResourceDefinition does not allow all of JSON Schema: references are inlined, the null variant of an
optional field is dropped, ``const`` becomes ``enum``, an exclusive bound of an integer becomes inclusive, and
closed objects lose ``additionalProperties`` (the API server itself prunes or refuses unknown fields).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

Schema = dict[str, Any]

_DROPPED = frozenset({"$defs", "title", "examples", "const", "anyOf", "allOf", "additionalProperties"})


class UnsupportedSchemaError(Exception):
    """A structural schema cannot express a field of the model."""


def structural_schema(model: type[BaseModel], without_defaults: frozenset[str] = frozenset()) -> Schema:
    """The schema of ``model``, inlined and reduced to what an API server accepts.

    Args:
        model: the model, by alias.
        without_defaults: dotted paths below which defaults are described instead of filled in.

    Raises:
        UnsupportedSchemaError: naming the field.
    """
    source = model.model_json_schema(by_alias=True)
    return _Rewriter(source.get("$defs", {}), without_defaults).rewrite(source, "")


class _Rewriter:
    def __init__(self, definitions: Mapping[str, Any], without_defaults: frozenset[str]) -> None:
        self._definitions = definitions
        self._without_defaults = without_defaults

    def rewrite(self, node: Mapping[str, Any], path: str) -> Schema:
        whole, optional = self._flattened(node, path)
        result = {key: value for key, value in whole.items() if key not in _DROPPED}
        if "const" in whole:
            result["enum"] = [whole["const"]]
        _bounds(result)
        _multiples(result)
        self._default(result, path)
        if "properties" in whole:
            result["properties"] = {
                name: self.rewrite(item, f"{path}.{name}" if path else name)
                for name, item in whole["properties"].items()
            }
            if not result["properties"]:
                del result[
                    "properties"
                ]  # the API server does the same; so a repeated apply finds no difference
            if not optional and not result.get("required") and (inner := _defaults_inside(result)):
                result["default"] = inner
        elif result.get("type") == "object":
            self._free_form(result, whole, path)
        if "items" in whole:
            result["items"] = self.rewrite(whole["items"], f"{path}[]")
        if "type" not in result and not result.get("x-kubernetes-preserve-unknown-fields"):
            raise UnsupportedSchemaError(f"{path}: has no type: {dict(node)}")
        return result

    def _flattened(self, node: Mapping[str, Any], path: str) -> tuple[Schema, bool]:
        """The schema with references and unions resolved, and True if null was one of the union."""
        whole, optional = dict(node), False
        for _ in range(8):
            if "$ref" in whole:
                target = self._definitions[str(whole.pop("$ref")).rsplit("/", 1)[-1]]
                whole = {**target, **whole}
            elif arms := whole.pop("anyOf", None):
                kinds = [arm for arm in arms if arm.get("type") != "null"]
                optional = len(kinds) < len(arms)
                if len(kinds) != 1:
                    raise UnsupportedSchemaError(f"{path}: a union of {len(kinds)} types")
                whole = {**kinds[0], **whole}
            elif arms := whole.pop("allOf", None):
                whole = {key: value for arm in arms for key, value in arm.items()} | whole
            else:
                break
        return whole, optional

    def _default(self, result: Schema, path: str) -> None:
        value = result.get("default")
        described = any(path == p or path.startswith(f"{p}.") for p in self._without_defaults)
        if described and value is not None:
            reported = str(value).lower() if isinstance(value, bool) else value
            result["description"] = f"{result.get('description', '')} Default: {reported}.".strip()
        if described or value is None or value == []:
            result.pop("default", None)

    @staticmethod
    def _free_form(result: Schema, whole: Schema, path: str) -> None:
        values = whole.get("additionalProperties", True)
        if isinstance(values, dict):
            if set(values) != {"type"}:
                raise UnsupportedSchemaError(f"{path}: a mapping to {values}")
            result["additionalProperties"] = values
        elif values is True:
            result["x-kubernetes-preserve-unknown-fields"] = True


def _defaults_inside(result: Schema) -> Schema:
    """Default of an absent object: complete, because rules run before the defaults of its fields apply."""
    return {name: item["default"] for name, item in result["properties"].items() if "default" in item}


def _bounds(result: Schema) -> None:
    """Convert exclusive bounds: inclusive for integers, OpenAPI's boolean form for numbers."""
    for exclusive, inclusive, step in (
        ("exclusiveMinimum", "minimum", 1),
        ("exclusiveMaximum", "maximum", -1),
    ):
        if exclusive not in result:
            continue
        value = result.pop(exclusive)
        if result.get("type") == "integer":
            result[inclusive] = value + step
        else:
            result[inclusive], result[exclusive] = value, True


def _multiples(result: Schema) -> None:
    """Convert a fractional ``multipleOf`` to a rule: for integral values the API server truncates it to 0."""
    factor = result.get("multipleOf")
    if result.get("type") != "number" or factor is None or factor >= 1:
        return
    del result["multipleOf"]
    steps = round(1 / factor)
    scaled = f"self * {steps}.0"
    result["x-kubernetes-validations"] = [
        {
            "rule": f"{scaled} - double(int({scaled} + 0.5)) < 0.0001 "
            f"&& double(int({scaled} + 0.5)) - {scaled} < 0.0001",
            "message": f"must be a multiple of {factor:g}",
        }
    ]
