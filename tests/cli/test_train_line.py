"""The live line of `ernie train`."""

from __future__ import annotations

from ernie45.cli.train import step_line


def test_a_line_of_reinforcement_shows_what_answers_are_worth() -> None:
    line = {
        "step": 3, "rewards/score": 0.6842, "rewards/spread": 0.3, "loss": 0.077, "rewards/accuracy": 0.25, "lr": 3e-5,
        "grad_norm": 2.111, "tokens_per_s": 1711.9, "mfu": 0.104, "memory_bytes": 1_800_000_000,
    }  # fmt: skip
    assert step_line(line, 40, 65.0) == (
        "step 3/40  loss 0.077  score 0.684  accuracy 0.25  lr 3.00e-05  |g| 2.11  1,712 tok/s  MFU 10%  1 min 05 s left  1.8 GB"
    )
