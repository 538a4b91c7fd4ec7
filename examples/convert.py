"""Convert a checkpoint to -Paddle and GGUF, and check that nothing was lost. Run: python examples/convert.py [MODEL]
[FOLDER]
"""

import sys
from pathlib import Path

import torch

import ernie45


def main(model_name: str = "smollm2-135m", folder: str = "converted") -> None:
    """Write both formats and compare the logits of the three."""
    paddle, gguf = Path(folder, "paddle"), Path(folder, "model.gguf")
    ernie45.convert(model_name, paddle, to="paddle", overwrite=True)
    done = ernie45.convert(model_name, gguf, to="gguf", overwrite=True)
    for note in done.notes:
        print("left out:", note)
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        logits = [ernie45.load_model(path)(ids) for path in (model_name, paddle, gguf)]
    print("same logits from -Paddle:", torch.equal(logits[0], logits[1]))
    print("same logits from GGUF:", torch.equal(logits[0], logits[2]))


if __name__ == "__main__":
    main(*sys.argv[1:])
