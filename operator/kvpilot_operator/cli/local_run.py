"""Resources of ``kvpilot up`` as the commands see them: the files of ``.kvpilot/NAME``."""

from __future__ import annotations

import getpass
import json
import secrets
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvpilot_operator.cli.target import CommandError, Json, NotFoundError, listed
from kvpilot_operator.local.overrides import OverrideFolder
from kvpilot_operator.local.state import OVERRIDES, ROOT, is_up
from kvpilot_operator.resource.times import to_rfc3339
from kvpilot_operator.status.history import parse_records
from kvpilot_operator.status.snapshot import Key

PAGE_TIMEOUT_S = 3.0


class LocalRun:
    """A run in a directory; see ``Target``."""

    def __init__(self, directory: Path, manifest: Json, options: str) -> None:
        metadata = manifest["metadata"]
        self.key = Key(str(metadata.get("namespace", "default")), str(metadata["name"]))
        self.manifest = manifest
        self.options = options
        self.ended = not is_up(directory)
        self._directory = directory
        self._overrides = OverrideFolder(directory / OVERRIDES)

    def records(self) -> list[Json]:
        """Whole decision records, oldest first."""
        decisions = self._directory / "decisions.jsonl"
        kept = decisions.read_bytes() if decisions.is_file() else b""
        return parse_records(kept.decode(errors="replace"))

    def overrides(self) -> list[Json]:
        """Overrides of the run."""
        return [*self._overrides.read()[0]]

    def create(self, override: Json) -> str:
        """Store an override as a file; returns its name.

        Raises:
            CommandError: the run has ended, or the file cannot be written.
        """
        if self.ended:
            raise CommandError(f"the run of {self.key.name} has ended; `kvpilot up` starts it again")
        metadata = override["metadata"]
        name = metadata.get("name") or f"{metadata['generateName']}{secrets.token_hex(3)[:5]}"
        created = {"name": name, "creationTimestamp": to_rfc3339(int(time.time()))}
        try:
            self._overrides.write({**override, "metadata": created})
        except OSError as error:
            raise CommandError(
                f"{self._directory / OVERRIDES}: cannot be written: {error.strerror}"
            ) from None
        return str(name)

    def delete(self, override: str) -> None:
        """Delete an override."""
        self._overrides.delete(override)

    def pages(self) -> dict[str, str | None]:
        """Text of the metrics page of each replica by its name; None for one that does not answer."""
        try:
            urls = json.loads((self._directory / "replicas.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        with ThreadPoolExecutor(max_workers=16) as pool:
            return dict(zip(urls, pool.map(_page, urls.values()), strict=True))

    def user(self) -> str:
        """The user of the operating system."""
        try:
            return getpass.getuser()
        except (KeyError, OSError):  # a user ID without a name
            return ""


def _page(url: str) -> str | None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=PAGE_TIMEOUT_S) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError, ValueError):
        return None


def runs_in(root: Path) -> list[str]:
    """Names of the runs in a directory of runs, or of the one that it is."""
    if (root / "resource.json").is_file():
        return [root.resolve().name]
    return sorted(path.parent.name for path in root.glob("*/resource.json"))


def find_run(name: str, root: Path) -> LocalRun:
    """The local run in ``root/NAME``, or in ``root`` itself.

    Raises:
        NotFoundError: there is no such run; names the existing ones.
    """
    directory = root if (root / "resource.json").is_file() else root / name
    try:
        manifest = json.loads((directory / "resource.json").read_text(encoding="utf-8"))
        found = manifest["metadata"]["name"]
    except OSError:
        raise NotFoundError(f"no run of {name} in {root}; there are: {listed(runs_in(root))}") from None
    except (ValueError, KeyError, TypeError):
        raise NotFoundError(f"{directory / 'resource.json'}: not a resource") from None
    if found != name:
        raise NotFoundError(f"{directory} is a run of {found}, not of {name}")
    return LocalRun(directory, manifest, "" if root == ROOT else f" --run {root}")
