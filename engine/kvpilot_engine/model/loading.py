"""Loading of models: two built-in ones, or a local directory of an allowed class.

Only full-attention GQA decoders with known attention arguments are accepted. Any other model is refused at
load, and the message names the cause: an ignored attention argument would silently give wrong answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers
import xxhash
from safetensors import SafetensorError, safe_open

from kvpilot_engine.contract import KVCacheConfig
from kvpilot_engine.model.attention import IMPLEMENTATION
from kvpilot_engine.model.vocabulary import (
    BOS_ID,
    BUILTIN_PREFIX,
    BYTE_VOCAB_SIZE,
    EOS_ID,
    GENERATED_IDS,
    PAD_ID,
)

ALLOWED_CLASSES: Final = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Model classes that are accepted; each has a parity test against the attention of transformers."""

ALLOWED_ROPE: Final = ("default", "linear", "llama3", "yarn")
"""RoPE types whose angles depend only on the position, so that a cached page is valid in every prompt."""

BUILTIN_CONTEXT: Final = 32_768
_BUILTIN_SEED: Final = 20_240_607
_BUILTIN_REVISION: Final = "1"
_LAYOUT_VERSION: Final = "1"


class ModelError(ValueError):
    """The model cannot be served; the message is one line."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run on paged attention.

    Attributes:
        module: the transformers model, in evaluation mode on ``device``.
        layers, heads, kv_heads, head_dim: shape of its attention.
        context_length: maximum of prompt and answer together, tokens.
        allowed_ids: ids that it may generate, the others are masked; None for all.
        eos_ids: ids that end an answer.
        root: start of the prefix hash chain: digest of weights, revision, RoPE, KV dtype and layout.
    """

    name: str
    module: Any
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    dtype: torch.dtype
    device: torch.device
    allowed_ids: tuple[int, ...] | None
    eos_ids: tuple[int, ...]
    root: bytes


def load_model(name: str, config: KVCacheConfig, revision: str = "") -> LoadedModel:
    """Load ``builtin/tiny-llama``, ``builtin/tiny-qwen3`` or a local directory.

    Args:
        name: name or path of the model.
        config: provides ``device``, ``dtype``, ``num_heads`` and ``head_dim``.
        revision: the owner's name of the weights; part of the root of the hash chain.

    Raises:
        ModelError: the name is unknown, a class or setting is not supported, the shape differs from an
            explicit ``num_heads`` or ``head_dim``, or the requested CUDA device is absent.
    """
    device = resolve_device(config.device)
    dtype: torch.dtype = getattr(torch, config.dtype)
    if name.startswith(BUILTIN_PREFIX):
        module, digest, allowed = _builtin(name, dtype)
    else:
        module, digest = _from_directory(Path(name), dtype)
        allowed = None
    settings = module.config
    heads = int(settings.num_attention_heads)
    head_dim = int(getattr(settings, "head_dim", None) or settings.hidden_size // heads)
    for field, given, actual in (
        ("num_heads", config.num_heads, heads),
        ("head_dim", config.head_dim, head_dim),
    ):
        if given is not None and given != actual:
            raise ModelError(f"{field}: {given} differs from the model's {actual}; leave it out to take it")
    module.set_attn_implementation(IMPLEMENTATION)
    module.to(device).eval().requires_grad_(requires_grad=False)
    return LoadedModel(
        name=name,
        module=module,
        layers=int(settings.num_hidden_layers),
        heads=heads,
        kv_heads=int(settings.num_key_value_heads),
        head_dim=head_dim,
        context_length=int(settings.max_position_embeddings),
        dtype=dtype,
        device=device,
        allowed_ids=allowed,
        eos_ids=_eos_ids(settings),
        root=_root(digest, revision, settings, config.dtype),
    )


def resolve_device(wanted: str) -> torch.device:
    """Device of a configuration; ``auto`` is CUDA if a device is present.

    Raises:
        ModelError: ``cuda`` was requested and no device is present.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelError("device: cuda was asked for, and this machine has no usable CUDA device")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _builtin(name: str, dtype: torch.dtype) -> tuple[Any, bytes, tuple[int, ...]]:
    shape = {
        "vocab_size": BYTE_VOCAB_SIZE,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": BUILTIN_CONTEXT,
        "tie_word_embeddings": False,
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
    }
    makers: dict[str, Callable[[], Any]] = {
        "builtin/tiny-llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)),
        "builtin/tiny-qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**shape)),
    }
    if name not in makers:
        raise ModelError(f"model: {name!r} is not built in; {' and '.join(makers)} are")
    module = makers[name]()
    _fill(module)
    return module.to(dtype), f"{name}@{_BUILTIN_REVISION}".encode(), GENERATED_IDS


def _fill(module: Any) -> None:
    """Set fixed-seed weights that keep the variance of activations, so that all context matters."""
    generator = torch.Generator().manual_seed(_BUILTIN_SEED)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)


def _from_directory(directory: Path, dtype: torch.dtype) -> tuple[Any, bytes]:
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"model: {str(directory)!r} is neither built in nor a directory with a config.json")
    settings = json.loads(path.read_text())
    check_supported(settings)
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise ModelError(f"model: {str(directory)!r} has no .safetensors file")
    for file in weights:
        _check_readable(file)
    cls = getattr(transformers, settings["architectures"][0])
    module = cls.from_pretrained(directory, dtype=dtype, local_files_only=True, use_safetensors=True)
    return module, _digest(weights)


def _check_readable(file: Path) -> None:
    """Refuse a file whose header does not match its length, such as an interrupted download."""
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ModelError(f"model: {file} is broken: {error}") from None


def check_supported(settings: dict[str, Any]) -> None:
    """Refuse a model for which paged full attention would give wrong answers.

    Args:
        settings: content of the model's ``config.json``.

    Raises:
        ModelError: names the class or the setting.
    """
    classes = settings.get("architectures") or ["none"]
    if classes[0] not in ALLOWED_CLASSES:
        raise ModelError(f"model: class {classes[0]} is not supported; {', '.join(ALLOWED_CLASSES)} are")
    window = settings.get("sliding_window")
    if window is not None and settings.get("use_sliding_window", True):
        raise ModelError(f"model: sliding_window={window} is not supported; only full attention is")
    layer_types = set(settings.get("layer_types") or ()) - {"full_attention"}
    if layer_types:
        raise ModelError(f"model: layer_types {', '.join(sorted(layer_types))} are not supported")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ALLOWED_ROPE:
        raise ModelError(f"model: rope_type {kind} is not supported; {', '.join(ALLOWED_ROPE)} are")
    if settings.get("quantization_config"):
        raise ModelError("model: quantization_config is not supported; give plain safetensors weights")


def _digest(weights: list[Path]) -> bytes:
    digest = xxhash.xxh3_128()
    for path in weights:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                digest.update(part)
    return bytes(digest.digest())


def _eos_ids(settings: Any) -> tuple[int, ...]:
    found = settings.eos_token_id
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list) else (int(found),)


def _root(digest: bytes, revision: str, settings: Any, dtype: str) -> bytes:
    rope = json.dumps(settings.rope_parameters, sort_keys=True, default=str)
    parts = (digest, revision.encode(), rope.encode(), dtype.encode(), _LAYOUT_VERSION.encode())
    joined = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hashlib.sha256(joined).digest()[:16]
