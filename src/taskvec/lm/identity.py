"""Which model is this? Hashes that tell one checkpoint and one tokenizer from another, without reading every weight."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


def fingerprint(model: Any) -> str:
    """SHA-256 of the configuration and of eight values of every weight, rounded to bfloat16 (so that a cast of the same
    checkpoint keeps it). A full hash would cost seconds; this one changes with any training."""
    config = _lasting(model.config.to_dict())
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        picked = flat[[i * (flat.numel() - 1) // 7 for i in range(8)]]
        values = picked.to(torch.bfloat16).float().tolist() if weight.is_floating_point() else picked.tolist()
        digest.update(f"{name} {values}".encode())
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the tokenizer (empty for None)."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(config: Any) -> Any:
    """A configuration without what loading changes, its parts' configurations too."""
    if not isinstance(config, Mapping):
        return config
    return {str(k): _lasting(v) for k, v in config.items() if k not in _VOLATILE}
