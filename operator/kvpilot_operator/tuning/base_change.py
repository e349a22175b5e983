"""What others decide: the user's configuration, and what engines and ConfigMap say after a lost status."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from kvpilot_operator.tuning import reasons
from kvpilot_operator.tuning.canary import abort
from kvpilot_operator.tuning.configuration import effective, kept_overlay, overlay_between
from kvpilot_operator.tuning.decision import WriteConfig
from kvpilot_operator.tuning.look import MOST_TOLD, Draft, Look, told_value
from kvpilot_operator.tuning.state import Told


def remember(look: Look, draft: Draft) -> Draft:
    """Take up what must never go back from engines and ConfigMap; with a lost status, go on from there."""
    promoted, state = look.observation.promoted, draft.state
    if promoted is None:
        return draft
    engines = [pod.engine for pod in look.observation.pods if pod.engine is not None]
    epoch = max([state.epoch, *(engine.epoch for engine in engines)])
    if state.last_generation:
        last = max(state.last_generation, promoted.generation)
        return draft.with_state(epoch=epoch, last_generation=last)
    last = max([promoted.generation, *(engine.generation for engine in engines)])
    draft = draft.with_state(epoch=epoch, last_generation=last)
    if promoted.generation == 1 and not epoch:
        return draft
    overlay = overlay_between(look.observation.base, promoted.config)
    return draft.with_state(overlay=overlay, cooldown_until=look.now + look.policy.pace.cooldown)


def adopt_edit(look: Look, draft: Draft) -> Draft:
    """Make the user's configuration the promoted one; tuned knobs that it overtakes fall back to it."""
    promoted, base = look.observation.promoted, look.observation.base
    if promoted is None:
        return draft
    kept, dropped = kept_overlay(base, draft.state.overlay, look.policy.bounds)
    wanted = effective(base, kept)
    # A promotion that was seen in the ConfigMap has joined the overlay by now.
    if not dropped and wanted == dict(promoted.config):
        return draft
    if draft.state.change is not None:
        draft = abort(look, draft, reasons.SPEC_CHANGED, "the user changed the configuration")
    latest = draft.state.last_generation
    if any(item.key == _key(latest, wanted) for item in draft.state.told):
        return draft.acting(WriteConfig(latest, wanted))  # written a moment ago, and not seen yet
    generation = latest + 1
    gone = ", ".join(f"{item.knob} (tuned to {told_value(item.value)})" for item in dropped)
    back = f"; back to the user's value: {gone}" if gone else ""
    edited = sorted(
        name for name in {*wanted, *promoted.config} if wanted.get(name) != promoted.config.get(name)
    )
    summary = f"The user's configuration changed in {', '.join(edited)}{back}; generation {generation}."
    draft = draft.recorded(look, rule="user-edit", outcome="Reset", summary=summary, generation=generation)
    told = (*draft.state.told, Told(_key(generation, wanted), look.now))[-MOST_TOLD:]
    draft = draft.with_state(overlay=kept, last_generation=generation, told=told)
    return draft.acting(WriteConfig(generation, wanted))


def _key(generation: int, config: Mapping[str, Any]) -> str:
    digest = zlib.crc32(json.dumps(config, sort_keys=True).encode())
    return f"edit:{generation}:{digest:08x}"
