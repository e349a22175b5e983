"""The generated definitions: structural schemas, equal to the committed files and those of the chart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from scripts.generate import definitions
from scripts.generate.schema import UnsupportedSchemaError, structural_schema

from kvpilot_engine.contract import KVCacheConfig

DEPLOYMENT = definitions.deployment_definition()["spec"]["versions"][0]
SCHEMA = DEPLOYMENT["schema"]["openAPIV3Schema"]
SPEC = SCHEMA["properties"]["spec"]


def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for item in node.get("properties", {}).values():
        yield from nodes(item)
    if "items" in node:
        yield from nodes(node["items"])


def at(path: str) -> dict[str, Any]:
    node = SCHEMA
    for part in path.split("."):
        node = node["items"] if part == "[]" else node["properties"][part]
    return node


def rules(node: dict[str, Any]) -> list[str]:
    return [rule["rule"] for rule in node.get("x-kubernetes-validations", [])]


def test_committed_files_match_the_models() -> None:
    assert definitions.main(["--check"]) == 0, "run `make generate` and commit"


DEFINITIONS = (definitions.deployment_definition(), definitions.override_definition())


@pytest.mark.parametrize("definition", DEFINITIONS)
def test_schema_is_structural(definition: dict[str, Any]) -> None:
    refused = {"$ref", "$defs", "anyOf", "const", "title", "examples", "patternProperties"}
    for node in nodes(definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
        assert "type" in node or node["x-kubernetes-preserve-unknown-fields"] is True
        assert not refused & node.keys()
        assert not ("properties" in node and "additionalProperties" in node)
        assert isinstance(node.get("exclusiveMinimum", True), bool)


def test_engine_configuration_has_every_field_and_no_default() -> None:
    config = at("spec.engine.config")["properties"]
    assert set(config) == {info.alias for info in KVCacheConfig.model_fields.values()}
    assert not [name for name, node in config.items() if "default" in node]
    assert config["numWorkers"]["description"].endswith("Default: 4.")
    assert (config["numWorkers"]["minimum"], config["numWorkers"]["maximum"]) == (1, 128)
    assert config["blockSize"]["enum"] == [128]


def test_fractional_multiple_becomes_a_rule() -> None:
    """``multipleOf: 0.01`` makes the API server refuse the whole number 1."""
    ratio = at("spec.engine.config.compressionRatio")
    assert "multipleOf" not in ratio
    assert ratio["x-kubernetes-validations"][0]["message"] == "must be a multiple of 0.01"
    assert (ratio["minimum"], ratio["exclusiveMinimum"], ratio["maximum"]) == (0.0, True, 1.0)


def test_absent_objects_have_defaults() -> None:
    assert at("spec.rollout")["default"] == {"maxSurge": 0, "maxUnavailable": 1, "drainSeconds": 120}
    assert at("spec.engine")["default"]["model"]["source"] == "builtin/tiny-llama"
    assert "default" not in at("spec.scaling")
    assert "default" not in SPEC
    assert not [node for node in nodes(SCHEMA["properties"]["status"]) if "default" in node]


def test_rules_express_the_models_constraints() -> None:
    assert rules(SPEC) == ["has(self.scaling) != has(self.replicas)"]
    assert rules(at("spec.scaling")) == ["self.min <= self.max"]
    assert rules(at("spec.engine.model")) == ["self == oldSelf"]
    assert len(rules(at("spec.objectives.latency"))) == 3
    assert at("spec.tuning.knobs")["x-kubernetes-list-map-keys"] == ["name"]
    assert at("spec.template") == {
        "description": at("spec.template")["description"],
        "type": "object",
        "properties": at("spec.template")["properties"],
    }
    assert at("spec.template.spec")["x-kubernetes-preserve-unknown-fields"] is True


def test_columns_names_and_scale_subresource() -> None:
    shown = [c["name"] for c in DEPLOYMENT["additionalPrinterColumns"] if c.get("priority", 0) == 0]
    assert shown == ["Mode", "SLO", "Ready", "LastAction", "Age"]
    assert DEPLOYMENT["subresources"]["scale"] == {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.selector",
    }
    short = [d["spec"]["names"]["shortNames"] for d in DEFINITIONS]
    assert short == [["kvcd"], ["kvco"]]
    assert definitions.deployment_definition()["spec"]["names"]["categories"] == ["all"]


def test_definition_is_small_enough_for_kubectl_apply() -> None:
    text = (definitions.REPOSITORY / "crds" / "kvcachedeployments.yaml").read_text()
    assert len(text.encode()) < 262_144 / 2


def test_chart_contains_the_same_definition() -> None:
    for plural in ("kvcachedeployments", "kvcacheoverrides"):
        plain = yaml.safe_load((definitions.REPOSITORY / "crds" / f"{plural}.yaml").read_text())
        template = (definitions.REPOSITORY / f"charts/kvpilot/templates/crds/{plural}.yaml").read_text()
        body = re.sub(r"^\s*\{\{.*\}\}\n", "", template, flags=re.MULTILINE)
        assert yaml.safe_load(body)["spec"] == plain["spec"]


def test_check_names_a_file_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(definitions, "REPOSITORY", tmp_path)
    assert definitions.main([]) == 0
    assert definitions.main(["--check"]) == 0
    (tmp_path / "crds" / "kvcacheoverrides.yaml").write_text("edited by hand\n")
    assert definitions.main(["--check"]) == 1
    assert "differs from the models: crds/kvcacheoverrides.yaml" in capsys.readouterr().err
    assert definitions.main(["--chekc"]) == 2


def test_union_that_a_schema_cannot_express_is_named() -> None:
    class Odd(BaseModel):
        size: int | str

    with pytest.raises(UnsupportedSchemaError, match="size: a union of 2 types"):
        structural_schema(Odd)
