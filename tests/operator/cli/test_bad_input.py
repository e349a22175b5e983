"""Odd command lines: one line that names the field, the value and what is allowed; exit code 2."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from tests.operator.cli.runs import ok, refused

from kvpilot_operator.local.state import StateDirectory

LABEL = "must be a DNS label such as chat, got"
KNOBS = "spec.pin.knob: must be one of the knobs numWorkers, "

LINES = [
    # Names, which become parts of paths and of URLs.
    *((f"{verb}", f"NAME: {LABEL} ''") for verb in ("pause ''", "resume ''", "boost '' 3", "history ''")),
    ("pause ../chat", f"NAME: {LABEL} '../chat'"),
    ("status /etc", f"NAME: {LABEL} '/etc'"),
    ("explain Chat", f"NAME: {LABEL} 'Chat'"),
    ("pin 'ch at' numWorkers 8", f"NAME: {LABEL} 'ch at'"),
    ("pause chat -n a/b", f"--namespace: {LABEL} 'a/b'"),
    ("status -n Team_A", f"--namespace: {LABEL} 'Team_A'"),
    # Places.
    ("pause chat --run nowhere", "no run of chat in nowhere; there are: none"),
    ("status --run nowhere", "no runs in nowhere"),
    ("status -A --run .kvpilot", "--all-namespaces: cannot go with --run"),
    ("pause chta", "no resource chta: no cluster to ask"),
    # Durations.
    *(
        (f"{verb} --for '{given}'", f"--for: '{given}' is not a duration such as 90s, 10m or 1h30m")
        for verb in ("pause chat", "boost chat 3", "pin chat numWorkers 8", "rollback chat")
        for given in ("", "2", "1d", "1.5h", "-1h", "999999h", "never")
    ),
    ("boost chat 3 --for 0h0m", "--for: must be longer than 0 s, got 0h0m"),
    # Words that are missing, too many, or unknown.
    ("pause", "Missing argument 'name'"),
    ("pin chat", "Missing argument 'knob'"),
    ("pin chat numWorkers", "Missing argument 'value'"),
    ("approve chat", "Missing argument 'decision'"),
    ("boost chat", "Missing argument 'MIN'"),
    ("pause chat --for", "Option '--for' requires an argument"),
    ("pause chat --scaling=yes", "Option '--scaling' does not take a value"),
    ("pause chat extra", "Got unexpected extra argument(s) (extra)"),
    ("rollback chat 5", "Got unexpected extra argument(s) (5)"),
    ("resume chat --for 1h", "No such option: --for"),
    ("pause chat -o xml", "--output: 'xml' is not one of 'text', 'json', 'yaml'"),
    # Values.
    *(
        (f"pin chat numWorkers {given}", "spec.pin.value: numWorkers must be a whole number from 1 to 128")
        for given in ("0", "8.5", "1e3", "true", "null", "NaN", "[8]", "''", "many", "-- -1", "9" * 30)
    ),
    ("pin chat cacheStrategy mru", "cacheStrategy must be one of lru, lfu, fifo, adaptive, got 'mru'"),
    ("pin chat enablePrefetch yes", "enablePrefetch must be true or false, got 'yes'"),
    ("pin chat compressionRatio .333", "in steps of 0.01, got '.333'"),
    ("pin chat compressionRatio Infinity", "compressionRatio must be a number above 0 and at most 1"),
    ("pin chat maxMemoryMb 1Gi", "maxMemoryMb must be a whole number from 100 to 16777216, got '1Gi'"),
    *((f"pin chat {knob} 8", KNOBS) for knob in ("workers", "numworkers", "num_workers", "''")),
    ("pin chat maxQueue 8", "; maxQueue is none, and only spec.engine.config sets it, got 'maxQueue'"),
    ("pin chat useQuantization true", "useQuantization is none, and only spec.engine.config sets it"),
    ("unpin chat numWorkers", "chat in default has no pin of numWorkers"),
    ("boost chat 1001", "spec.boost.minReplicas: Input should be less than or equal to 1000, got 1001"),
    ("boost chat -- -3", "spec.boost.minReplicas: Input should be greater than or equal to 1, got -3"),
    ("boost chat 1.5", "MIN: Input should be a valid integer"),
    ("boost chat -3", "No such option: -3; a negative value goes behind --"),
    ("pin chat numWorkers -1", "No such option: -1; a negative value goes behind --"),
    *((f"approve chat {given}", "spec.approve.decision: ") for given in ("d-1", "D-0001", "''", "'d-0001 '")),
    ("rollback chat --to 0", "spec.rollback.to: Input should be greater than or equal to 1, got 0"),
    ("rollback chat --to x", "--to: "),
    ("rollback chat --to 6", "generation 6 is not kept; these are: 5, 7"),
    ("pause chat --by " + "a" * 254, "spec.by: String should have at most 253 characters"),
    ("history chat --last 0", "--last: "),
    ("explain chat --last many", "--last: "),
    ("explain chat --why-not workers", "--why-not: there is no knob workers; there are: numWorkers, "),
    ("top chat --interval nan", "--interval: Input should be less than or equal to 60, got nan"),
    ("top chat --interval 0", "--interval: "),
    ("pin chat numWorkers '{\"a\": 1}'", "from 1 to 128, got several values"),
    ("explain chat --why-not ''", "--why-not: there is no knob ; there are: numWorkers, "),
    ("explain chat --why-not numWorkers --last 3", "--last: cannot go with --why-not"),
    # Recordings.
    ("record chat --url ftp://x --out o", "--url: "),
    *(
        (f"record chat --url http://127.0.0.1:9 {given}", fault)
        for given, fault in (
            ("--out nowhere/o", "--out: must be a file in a directory that exists, got nowhere/o"),
            ("--out o --step nan", "--step: must be a whole number from 5 to 3600, got nan"),
            ("--out o --since x", "--since: must be a duration before now (24h) or an RFC 3339 time, got x"),
            ("--out o --since 1h --until 2h", "--since: must be 1 to 100000 steps of 60 s before --until"),
            (
                "--out o --token-file nope",
                "--token-file: cannot be read: No such file or directory, got nope",
            ),
            ("--out o --ca-file .kvpilot", "--ca-file: cannot be read: Is a directory, got .kvpilot"),
        )
    ),
    ("record 'a\"b' --url http://127.0.0.1:9 --out o", f"NAME: {LABEL} 'a\"b'"),
]


@pytest.mark.parametrize(("line", "said"), LINES, ids=[item[0][:60] for item in LINES])
def test_odd_command_line_is_one_line_and_changes_nothing(run: StateDirectory, line: str, said: str) -> None:
    words = shlex.split(line)
    got = refused(*words)
    assert got.startswith(f"kvpilot {words[0]}: ")
    assert said in got
    assert run.overrides.read() == ([], [])


def test_files_of_a_run_that_are_damaged_are_left_out(run: StateDirectory) -> None:
    before = ok("history", "chat")
    decisions = run.path / "decisions.jsonl"
    damaged = b'\xff\n{"id": 1, "at": "x", "outcome": []}\n[]\n{"id": "d-9", "at": null, "outcome": "x"}\n'
    decisions.write_bytes(damaged + decisions.read_bytes())
    assert ok("history", "chat") == before
    Path(run.path / "overrides").mkdir(exist_ok=True)
    (run.path / "overrides/broken.json").write_bytes(b"\xff{")
    assert "chat" in ok("status", "chat")
