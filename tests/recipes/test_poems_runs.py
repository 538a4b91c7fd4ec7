"""The run files of the recipe: each is one, and each goes on from the stage before it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.config.run_file import read_run_file
from ernie45.training.config import RunConfig
from ernie45.training.rewards import load_reward

FOLDER = Path(__file__).parents[2] / "recipes/poems"
STAGES = ("pretrain", "sft", "dpo", "upo")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_loads(stage: str) -> None:
    config = read_run_file(FOLDER / f"{stage}.yaml", RunConfig)
    assert config.method == stage
    before = STAGES[STAGES.index(stage) - 1] if stage != STAGES[0] else None
    assert config.model.start == (None if before is None else f"runs/poems-{before}")


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(STAGES)


def test_the_reward_is_there() -> None:
    pytest.importorskip("pypinyin")
    (reward,) = read_run_file(FOLDER / "upo.yaml", RunConfig).rewards
    assert callable(load_reward(reward))


def test_the_network_is_of_the_promised_kind() -> None:
    network = read_run_file(FOLDER / "pretrain.yaml", RunConfig).model.network
    assert network is not None
    assert network.moe is not None
    assert network.moe.moe_num_experts >= 16
    assert network.moe.moe_num_shared_experts
    assert network.moe.moe_use_aux_free
    assert network.num_nextn_predict_layers == 1
