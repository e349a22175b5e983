"""Merges the user's pod template over kvpilot's.

Mappings merge deep; null removes. Lists replace, but for those whose items have a name:

==================================  ===========  ==================================================
list                                key          an item that both have
==================================  ===========  ==================================================
containers, initContainers, ports   name         merges deep
env, volumes                        name         is replaced, as its sources exclude one another
volumeMounts                        mountPath    is replaced
==================================  ===========  ==================================================

A probe or hook has one handler: the user's replaces ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DEEP = {"containers": "name", "initContainers": "name", "ports": "name"}
_WHOLE = {"env": "name", "volumes": "name", "volumeMounts": "mountPath"}
_HANDLERS = frozenset({"exec", "httpGet", "tcpSocket", "grpc", "sleep"})
_HANDLED = frozenset({"startupProbe", "readinessProbe", "livenessProbe", "preStop", "postStart"})


def merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """``theirs`` over ``ours``; neither is changed."""
    result = dict(ours)
    for key, value in theirs.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            result[key] = merged(_base(key, result.get(key), value), value)
        elif isinstance(value, list) and isinstance(result.get(key), list):
            result[key] = _lists(key, result[key], value)
        else:
            result[key] = value
    return result


def _base(key: str, ours: Any, theirs: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(ours, Mapping):
        return {}
    if key in _HANDLED and _HANDLERS & theirs.keys():
        return {name: value for name, value in ours.items() if name not in _HANDLERS or name in theirs}
    return ours


def _lists(key: str, ours: list[Any], theirs: list[Any]) -> list[Any]:
    identity = _DEEP.get(key) or _WHOLE.get(key)
    if identity is None:
        return list(theirs)
    result = list(ours)
    places = {item[identity]: index for index, item in enumerate(result) if identity in item}
    for item in theirs:
        place = places.get(item.get(identity))
        if place is None:
            result.append(item)
        else:
            result[place] = merged(result[place], item) if key in _DEEP else item
    return result
