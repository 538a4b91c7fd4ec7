"""`benchmarks/first_token.py` on a small packed model: it prints a time and a size. No speed is asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import ernie45
from ernie45.bench.random_weights import write_packed
from ernie45.quant.scheme import make_scheme

ROOT = Path(__file__).parents[2]
CONFIG = ernie45.ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=32,
)  # fmt: skip


def run(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/first_token.py"), str(folder), "--repeats", "1", "--prompt", "3"]
    command += more
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_time_and_a_size(tmp_path: Path) -> None:
    write_packed(CONFIG, make_scheme("wint4-all"), tmp_path / "model")
    done = run(tmp_path / "model")
    assert re.fullmatch(
        r"ernie45: first token of a 3-token prompt after [\d.]+ s \([\d.]+-[\d.]+\), peak memory 0\.[1-9]\d? GB\n",
        done.stdout,
    ), done.stdout + done.stderr


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    done = run(tmp_path / "none")
    assert done.returncode != 0
    assert "the process ended with status" in done.stderr


def test_a_peer_that_is_not_built(tmp_path: Path) -> None:
    write_packed(CONFIG, make_scheme("wint4-all"), tmp_path / "model")
    done = run(tmp_path / "model", "--llama-cpp", str(tmp_path), "--peer-file", "x.gguf")
    assert done.stdout.startswith("ernie45: "), "ours is measured and told"
    assert "build llama.cpp with the target llama-server" in done.stderr
    assert "go together" in run(tmp_path / "model", "--llama-cpp", str(tmp_path)).stderr
