"""Options that several commands share, defined once and taken as one parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of a group in place of each parameter that takes the group.

    A group is a dataclass whose fields are options; the parameter's default holds their defaults.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {}
    shown: list[Parameter] = []
    for item in signature(command).parameters.values():
        kind = hints[item.name]
        if not (isinstance(kind, type) and is_dataclass(kind)):
            shown.append(Parameter(item.name, Parameter.KEYWORD_ONLY, default=item.default, annotation=kind))
            continue
        groups[item.name] = kind
        options = get_type_hints(kind, include_extras=True)
        shown += [
            Parameter(
                name,
                Parameter.KEYWORD_ONLY,
                default=getattr(item.default, name),
                annotation=options[name],
            )
            for name in _names(kind)
        ]

    def run(**given: Any) -> None:
        for name, kind in groups.items():
            given[name] = kind(**{option: given.pop(option) for option in _names(kind)})
        command(**given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {item.name: item.annotation for item in shown}
    run.__signature__ = Signature(shown)  # type: ignore[attr-defined]  # which typer and inspect read
    return run


def _names(kind: Any) -> list[str]:
    return [item.name for item in fields(kind)]
