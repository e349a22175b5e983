"""Writing and ending KVCacheOverrides for the commands: checked first as the operator will judge them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvpilot_operator.cli.arguments import Terms
from kvpilot_operator.cli.output import Format, emit
from kvpilot_operator.cli.target import CommandError, Target
from kvpilot_operator.resource.errors import ManifestError
from kvpilot_operator.resource.model import API_VERSION
from kvpilot_operator.resource.override import KVCacheOverride
from kvpilot_operator.resource.times import moment
from kvpilot_operator.status.model import value_text
from kvpilot_operator.status.overrides import IN_FORCE, kind_of, name_of, overrides_of


@dataclass(frozen=True)
class Asked:
    """What a command asks for.

    Attributes:
        what: the field of the spec that asks for it.
        said: what it does, one clause.
        undo: command that ends it earlier; "" where none does.
    """

    what: dict[str, Any]
    said: str
    undo: str = ""


def ask(target: Target, asked: Asked, terms: Terms, output: Format) -> None:
    """Create an override, unless the operator would not obey it; say what it does and until when.

    Raises:
        CommandError: it is invalid, contradicts another one, or is refused.
    """
    seconds = terms.seconds
    [kind] = asked.what
    key = target.key
    spec = {
        "target": key.name,
        **asked.what,
        "ttl": terms.duration,
        "by": target.user() if terms.by is None else terms.by,
        "reason": terms.reason,
    }
    override = {
        "apiVersion": API_VERSION,
        "kind": "KVCacheOverride",
        "metadata": {"generateName": f"{key.name[:40]}-{kind}-", "namespace": key.namespace},
        "spec": spec,
    }
    limit = _checked(target, override)
    name = target.create(override)
    until = moment(time.time() + seconds)
    lines = [f"{key.name} in {key.namespace}: {asked.said}, until {until} ({name})."]
    if limit:
        lines.append(f"Note: it {limit}.")
    if asked.undo:
        lines.append(f"End it earlier: kvpilot {asked.undo}{target.options}")
    document = {"name": name, "namespace": key.namespace, "until": until, "spec": spec, "note": limit}
    emit(output, document, lambda: lines)


def _checked(target: Target, override: dict[str, Any]) -> str:
    """What the override asks for and will not get, in words; "" if it gets everything.

    Raises:
        CommandError: the operator would not obey it, or not another one any more.
    """
    if target.ended:
        raise CommandError(f"the run of {target.key.name} has ended; `kvpilot up` starts it again")
    try:
        KVCacheOverride.parse(override)
    except ManifestError as error:
        raise CommandError("; ".join(error.lines)) from None
    now = time.time()
    created = moment(now + 1)  # after every other one, also one of the same second
    new = {**override, "metadata": {**override["metadata"], "creationTimestamp": created}}
    others = target.overrides()
    before = overrides_of(others, target.key.name, target.manifest, now)
    after = overrides_of([*others, new], target.key.name, target.manifest, now)
    own = next(item for item in after.verdicts if item.name == name_of(new))
    if not own.in_force:
        raise CommandError(own.message)
    displaced = [item for item in before.names if item not in after.names]
    if displaced and "pin" in override["spec"]:
        raise CommandError(f"contradicts {', '.join(displaced)}, which is in force; end that one first")
    return "" if own.reason == IN_FORCE else own.message


def end(
    target: Target, kind: str, chosen: Callable[[dict[str, Any]], bool], none: str, output: Format
) -> None:
    """Delete the overrides of one kind that are chosen by their spec.

    Args:
        none: what to say of the resource if there is none, such as ``is not paused``.

    Raises:
        CommandError: there is none.
    """
    found = [
        item
        for item in target.overrides()
        if item["spec"]["target"] == target.key.name and kind_of(item) == kind and chosen(item["spec"])
    ]
    if not found:
        raise CommandError(f"{target.key.name} in {target.key.namespace} {none}")
    for item in found:
        target.delete(name_of(item))
    document = {"ended": [name_of(item) for item in found], "namespace": target.key.namespace}
    emit(output, document, lambda: [_ended(target, kind, item["spec"], name_of(item)) for item in found])


def _ended(target: Target, kind: str, spec: dict[str, Any], name: str) -> str:
    what = f" of {spec['pin']['knob']} to {value_text(spec['pin']['value'])}" if kind == "pin" else ""
    who = f" by {spec['by']}" if spec.get("by") else ""
    return f"{target.key.name} in {target.key.namespace}: the {kind}{what}{who} is ended ({name})."
