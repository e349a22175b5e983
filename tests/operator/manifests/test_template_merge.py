"""A user's template over ours: by name where items have names, else it replaces."""

from __future__ import annotations

from typing import Any

import pytest

from kvpilot_operator.manifests.merge import merged


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"a": {"b": 1, "c": 3}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"a": {"b": 1}}, {"a": {"b": None, "c": 2}}, {"a": {"c": 2}}),
        ({}, {"a": {"b": None}}, {"a": {}}),
        ({"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
        (
            {"containers": [{"name": "engine", "image": "x", "args": ["a"]}]},
            {"containers": [{"name": "side", "image": "y"}, {"name": "engine", "image": "z"}]},
            {
                "containers": [
                    {"name": "engine", "image": "z", "args": ["a"]},
                    {"name": "side", "image": "y"},
                ]
            },
        ),
        (
            {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]},
            {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {}}}]},
            {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {}}}, {"name": "B", "value": "2"}]},
        ),
        (
            {"volumes": [{"name": "tmp", "emptyDir": {}}]},
            {"volumes": [{"name": "tmp", "hostPath": {"path": "/x"}}]},
            {"volumes": [{"name": "tmp", "hostPath": {"path": "/x"}}]},
        ),
        (
            {"volumeMounts": [{"mountPath": "/tmp", "name": "tmp", "readOnly": True}]},
            {
                "volumeMounts": [
                    {"mountPath": "/tmp", "name": "other"},
                    {"mountPath": "/x", "name": "tmp"},
                ]
            },
            {
                "volumeMounts": [
                    {"mountPath": "/tmp", "name": "other"},
                    {"mountPath": "/x", "name": "tmp"},
                ]
            },
        ),
        (
            {"ports": [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]},
            {"ports": [{"name": "http", "hostPort": 80}, {"containerPort": 9}]},
            {
                "ports": [
                    {"name": "http", "containerPort": 8000, "protocol": "TCP", "hostPort": 80},
                    {"containerPort": 9},
                ]
            },
        ),
        (
            {"livenessProbe": {"httpGet": {"path": "/"}, "periodSeconds": 10}},
            {"livenessProbe": {"exec": {"command": ["true"]}}},
            {"livenessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 10}},
        ),
        (
            {"livenessProbe": {"httpGet": {"path": "/", "port": 1}}},
            {"livenessProbe": {"httpGet": {"path": "/x"}, "periodSeconds": 5}},
            {"livenessProbe": {"httpGet": {"path": "/x", "port": 1}, "periodSeconds": 5}},
        ),
        ({"tolerations": [{"key": "a"}]}, {"tolerations": [{"key": "b"}]}, {"tolerations": [{"key": "b"}]}),
    ],
)
def test_merge(ours: dict[str, Any], theirs: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr((ours, theirs))
    assert merged(ours, theirs) == expected
    assert repr((ours, theirs)) == before, "neither side is changed"
