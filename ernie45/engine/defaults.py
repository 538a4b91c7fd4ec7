"""How a model wants to be sampled where a request does not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie45.engine.params import SamplingParams
from ernie45.errors import CheckpointError, RequestError

PRESETS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What generation_config.json may preset, by our names."""
# The advice on the model cards of ERNIE 4.5, for models that state nothing.
_RECOMMENDED = {"temperature": 0.8, "top_p": 0.8}


def model_defaults(path: Path) -> dict[str, Any]:
    """Fields of `SamplingParams`, from the generation_config.json of a checkpoint folder. Raises: CheckpointError."""
    file = path / "generation_config.json"
    if not file.is_file():
        return _RECOMMENDED
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
        chosen = {name: stated[name] for name in PRESETS if stated.get(name) is not None}
        if stated.get("do_sample") is False:
            chosen["temperature"] = 0.0
        SamplingParams(**chosen)
    except (ValueError, AttributeError, RequestError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}; correct or remove it") from error
    return chosen or _RECOMMENDED
