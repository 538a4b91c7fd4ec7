"""ernie45: run, serve, quantize and train Baidu's ERNIE 4.5 models in PyTorch, CPU first.

The names below are the public interface; everything else may change. They are loaded on first use, so that importing
the package is cheap and silent.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie45.checkpoint.verify import verify
    from ernie45.config.count import count_parameters
    from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
    from ernie45.config.presets import preset, presets
    from ernie45.engine.config import EngineConfig
    from ernie45.engine.drafts import MtpSpeculation, NgramSpeculation
    from ernie45.engine.params import LoopDetection, SamplingParams
    from ernie45.engine.pieces import Completion, Piece
    from ernie45.engine.reference import generate, generate_batch
    from ernie45.llm import LLM, Answer
    from ernie45.processing.constraint import Constraint
    from ernie45.store.api import load_model, load_tokenizer, save_model
    from ernie45.store.convert import convert
    from ernie45.store.pull import pull

__version__ = "0.1.0"

_HOME = {
    "LLM": "ernie45.llm",
    "Answer": "ernie45.llm",
    "Completion": "ernie45.engine.pieces",
    "Constraint": "ernie45.processing.constraint",
    "EngineConfig": "ernie45.engine.config",
    "LoopDetection": "ernie45.engine.params",
    "ModelConfig": "ernie45.config.model",
    "MoeConfig": "ernie45.config.model",
    "MtpSpeculation": "ernie45.engine.drafts",
    "NgramSpeculation": "ernie45.engine.drafts",
    "Piece": "ernie45.engine.pieces",
    "SamplingParams": "ernie45.engine.params",
    "VisionConfig": "ernie45.config.model",
    "convert": "ernie45.store.convert",
    "count_parameters": "ernie45.config.count",
    "generate": "ernie45.engine.reference",
    "generate_batch": "ernie45.engine.reference",
    "load_model": "ernie45.store.api",
    "load_tokenizer": "ernie45.store.api",
    "preset": "ernie45.config.presets",
    "presets": "ernie45.config.presets",
    "pull": "ernie45.store.pull",
    "save_model": "ernie45.store.api",
    "verify": "ernie45.checkpoint.verify",
}

__all__ = [
    "LLM",
    "Answer",
    "Completion",
    "Constraint",
    "EngineConfig",
    "LoopDetection",
    "ModelConfig",
    "MoeConfig",
    "MtpSpeculation",
    "NgramSpeculation",
    "Piece",
    "SamplingParams",
    "VisionConfig",
    "convert",
    "count_parameters",
    "generate",
    "generate_batch",
    "load_model",
    "load_tokenizer",
    "preset",
    "presets",
    "pull",
    "save_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ernie45' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
