"""Models: parity with transformers' own attention, what is refused, and directories."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.contract.config import QUIET
from kvpilot_engine.model.attention import IMPLEMENTATION, UnsupportedAttentionError
from kvpilot_engine.model.loading import ALLOWED_CLASSES, LoadedModel, ModelError, load_model
from kvpilot_engine.model.runner import ModelRunner, Work

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
CLASSES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention_bias": True},
    "MistralForCausalLM": {"sliding_window": None},
    "Qwen2ForCausalLM": {"use_sliding_window": False},
    "Qwen3ForCausalLM": {"head_dim": 32},
}
CPU32 = KVCacheConfig(dtype="float32", device="cpu")


def save(directory: Path, name: str, **settings: Any) -> Any:
    """A tiny random model of that class in ``directory``; returns it, on transformers' sdpa."""
    torch.manual_seed(7)
    cls = getattr(transformers, name)
    reference = cls(cls.config_class(**{**SHAPE, **settings}))
    for parameter in reference.parameters():  # the default initialisation hardly attends at all
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, parameter.shape[1] ** -0.5)
    reference.save_pretrained(directory)
    reference.set_attn_implementation("sdpa")
    return reference.eval()


def pool(model: LoadedModel, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pool full of values that would show if they were attended to."""
    shape = (model.layers, pages * 16, model.kv_heads, model.head_dim)
    return torch.full(shape, 50.0), torch.full(shape, 50.0)


def test_every_allowed_class_has_a_parity_test() -> None:
    assert set(CLASSES) == set(ALLOWED_CLASSES)


@pytest.mark.parametrize("name", CLASSES)
def test_parity_with_sdpa(name: str, tmp_path: Path) -> None:
    """Sequences of different lengths, prefilled in chunks and decoded together, on scattered pages."""
    reference = save(tmp_path, name, **CLASSES[name])
    model = load_model(str(tmp_path), CPU32)
    runner = ModelRunner(model)
    k, v = pool(model, 64)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)).tolist()
    lengths = (5, 16, 33, 120)
    generator = torch.Generator().manual_seed(2)
    tokens = [torch.randint(97, (length + 4,), generator=generator).tolist() for length in lengths]
    pages = [order[12 * i : 12 * i + 12] for i in range(len(lengths))]
    with torch.inference_mode():
        expected = [reference(torch.tensor([ids])).logits[0] for ids in tokens]
    worst = 0.0
    for cut in (3, None):
        for i, length in enumerate(lengths):
            begin, end = (0, cut) if cut else (3, length)
            rows = runner.run([Work(tokens[i][begin:end], begin, pages[i], sample=True)], k, v)
            worst = max(worst, float((rows[0] - expected[i][end - 1]).abs().max()))
    for step in range(4):
        works = [
            Work([tokens[i][length + step]], length + step, pages[i], sample=True)
            for i, length in enumerate(lengths)
        ]
        rows = runner.run(works, k, v)
        for i, length in enumerate(lengths):
            worst = max(worst, float((rows[i] - expected[i][length + step]).abs().max()))
    assert worst <= 1e-5
    assert max(float(e.abs().max()) for e in expected) > 1.0


def test_decode_and_prefill_share_a_step(tmp_path: Path) -> None:
    reference = save(tmp_path, "LlamaForCausalLM")
    model = load_model(str(tmp_path), CPU32)
    runner = ModelRunner(model)
    k, v = pool(model, 32)
    one, two = list(range(40)), list(range(20, 80))
    runner.run(
        [Work(one[:39], 0, [0, 1, 2], sample=False), Work(two[:10], 0, [9, 8, 7, 6], sample=False)], k, v
    )
    works = [Work(two[10:60], 10, [9, 8, 7, 6], sample=True), Work(one[39:], 39, [0, 1, 2], sample=True)]
    rows = runner.run(works, k, v)
    with torch.inference_mode():
        for row, ids in zip(rows, (two, one), strict=True):
            assert (row - reference(torch.tensor([ids])).logits[0, -1]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["builtin/tiny-llama", "builtin/tiny-qwen3"])
def test_built_in_models_are_the_same_everywhere_and_load_at_once(name: str) -> None:
    began = time.process_time()
    first = load_model(name, CPU32)
    assert time.process_time() - began < 2.0
    second = load_model(name, CPU32)
    for a, b in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.root == second.root
    assert first.context_length >= 16_384
    logits = ModelRunner(first).run([Work([65, 66], 0, [0], sample=True)], *pool(first, 1))
    allowed = torch.isfinite(logits[0]).nonzero().flatten().tolist()
    assert allowed == [10, *range(0x20, 0x7F)]


def test_the_root_separates_what_must_not_share_pages(tmp_path: Path) -> None:
    save(tmp_path / "a", "LlamaForCausalLM")
    save(tmp_path / "b", "LlamaForCausalLM", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    half = KVCacheConfig.model_validate({"dtype": "float16", "device": "cpu"}, context=QUIET)
    roots = [
        load_model("builtin/tiny-llama", CPU32).root,
        load_model("builtin/tiny-llama", CPU32, revision="2").root,
        load_model("builtin/tiny-llama", half).root,
        load_model("builtin/tiny-qwen3", CPU32).root,
        load_model(str(tmp_path / "a"), CPU32).root,
        load_model(str(tmp_path / "b"), CPU32).root,
    ]
    assert len(set(roots)) == len(roots)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "class GemmaForCausalLM is not supported; LlamaForCausalLM",
        ),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 64},
            "sliding_window=64 is not supported",
        ),
        (
            {"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types sliding_attention are not supported",
        ),
        (
            {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"rope_type": "dynamic"}},
            "rope_type dynamic is not supported",
        ),
        ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["LlamaForCausalLM"]}, r"has no \.safetensors file"),
    ],
)
def test_unsupported_model_is_refused_by_name(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=reason):
        load_model(str(tmp_path), CPU32)


@pytest.mark.parametrize("argument", ["sliding_window", "softcap", "s_aux"])
def test_an_unknown_attention_argument_is_refused_by_name(argument: str) -> None:
    model = load_model("builtin/tiny-llama", CPU32)
    attend = transformers.AttentionInterface()[IMPLEMENTATION]
    x = torch.zeros(1, 2, 1, 4)
    with pytest.raises(UnsupportedAttentionError, match=f"{argument}=.* is not supported"):
        attend(model.module, x, x, x, None, scaling=1.0, ctx=None, **{argument: 1.0})


def test_an_explicit_shape_must_be_the_models() -> None:
    load_model("builtin/tiny-llama", CPU32.updated({"num_heads": 8, "head_dim": 32}))
    with pytest.raises(ModelError, match="num_heads: 12 differs from the model's 8"):
        load_model("builtin/tiny-llama", CPU32.updated({"num_heads": 12}))
    with pytest.raises(ModelError, match="head_dim: 64 differs from the model's 32"):
        load_model("builtin/tiny-llama", CPU32.updated({"head_dim": 64}))


def test_unknown_model_name_gives_a_one_line_error() -> None:
    with pytest.raises(ModelError, match=r"'builtin/gpt-9' is not built in; builtin/tiny-llama and"):
        load_model("builtin/gpt-9", CPU32)
    with pytest.raises(ModelError, match="'no/where' is neither built in nor a directory"):
        load_model("no/where", CPU32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_asked_for_and_absent() -> None:
    with pytest.raises(ModelError, match="device: cuda was asked for"):
        load_model("builtin/tiny-llama", CPU32.updated({"device": "cuda"}))
