"""ERNIEKit's run files: every field is taken over, or named with the reason why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie45.config.run_file import dump_run, parse_run
from ernie45.errors import ConfigError, NotFoundError
from ernie45.training.config import RunConfig
from ernie45.training.erniekit import Converted, convert_erniekit


def convert(tmp_path: Path, text: str) -> Converted:
    path = tmp_path / "kit.yaml"
    path.write_text(text)
    return convert_erniekit(path)


def told(converted: Converted, field: str) -> str:
    (line,) = [line for line in converted.report if line.startswith(f"{field}:")]
    return line


SFT = """
### data
train_dataset_type: "erniekit,alpaca"
train_dataset_path: "a.jsonl, b.json"
train_dataset_prob: "0.4,0.6"
eval_dataset_path: c.jsonl
max_seq_len: 8192
### model
model_name_or_path: baidu/ERNIE-4.5-0.3B-PT
fine_tuning: LoRA
lora_rank: 32
lora_alpha: -1
rslora_plus: true
stage: SFT
seed: 23
batch_size: 2
gradient_accumulation_steps: 8
max_steps: 100
learning_rate: 3e-4
min_lr: 1.0e-6
lr_scheduler_type: cosine
warmup_steps: 20
weight_decay: 0.1
adam_beta1: 0.8
adam_beta2: 0.95
logging_steps: 1
save_steps: 50
save_total_limit: 5
tensor_parallel_degree: 4
sharding: stage1
unified_checkpoint: true
fuse_rope: true
recompute: true
moe_aux_loss_lambda: 0
beta: 0.3
something_else: 7
compute_type: bf16
"""


def test_a_tuning_file(tmp_path: Path) -> None:
    got = convert(tmp_path, SFT)
    config = got.config
    assert config.method == "sft"
    assert config.model.start == "baidu/ERNIE-4.5-0.3B-PT"
    assert config.model.dtype == "bfloat16"
    assert [(source.path, source.weight) for source in config.data.train] == [("a.jsonl", 0.4), ("b.json", 0.6)]
    assert [source.path for source in config.data.valid] == ["c.jsonl"]
    assert config.data.max_seq_len == 8192
    assert config.lora is not None
    assert (config.lora.rank, config.lora.resolved_alpha, config.lora.rslora) == (32, 4, True)
    assert config.lora.lora_plus_scale == 4
    assert (config.train.rows_per_pass, config.train.accumulation, config.train.steps, config.train.seed) == (
        2,
        8,
        100,
        23,
    )
    assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.weight_decay) == (3e-4, (0.8, 0.95), 0.1)
    assert (config.schedule.kind, config.schedule.warmup_steps, config.schedule.min_lr) == ("cosine", 20, 1e-6)
    assert (config.checkpoint.every, config.checkpoint.keep) == (50, 5)
    assert config.recompute.policy == "full"
    assert config.loss.router.balance == 0
    for field, reason in {
        "tensor_parallel_degree": "on one process",
        "sharding": "on one process",
        "unified_checkpoint": "whole, exact",
        "fuse_rope": "without being asked",
        "something_else": "no field of ours does this",
        "train_dataset_type": "told from its keys",
        "preference": "beta was left out: sft does not read it",
    }.items():
        assert reason in told(got, field)
    assert parse_run(dump_run(config), RunConfig) == config, "what is printed is a run file"


def test_a_preference_file(tmp_path: Path) -> None:
    got = convert(
        tmp_path,
        "stage: DPO\nfine_tuning: Full\nmodel_name_or_path: m\ntrain_dataset_path: a.jsonl\nmax_steps: 800\nbeta: 0.2\n"
        "loss_type: dpop\nmax_prompt_len: 2048\nmoe_aux_loss_lambda: 1e-5\nref_model_update_steps: 50\n",
    )
    assert got.config.method == "dpo"
    assert got.config.lora is None
    assert (got.config.preference.beta, got.config.preference.loss_type) == (0.2, "dpop")
    assert got.config.data.max_prompt_len == 2048
    assert got.config.reference.refresh_steps == 50
    assert "router was left out: dpo does not read it" in told(got, "loss")


@pytest.mark.parametrize(
    ("stated", "steps", "epochs"),
    [("", None, 1), ("num_train_epochs: 3\n", None, 3), ("max_steps: -1\n", None, 1), ("max_steps: 7\n", 7, None)],
)
def test_the_length_of_a_run_is_as_there(tmp_path: Path, stated: str, steps: int | None, epochs: float | None) -> None:
    config = convert(tmp_path, f"model_name_or_path: m\ntrain_dataset_path: a.jsonl\n{stated}").config
    assert (config.train.steps, config.train.epochs) == (steps, epochs)


def test_steps_win_over_epochs_as_there(tmp_path: Path) -> None:
    got = convert(tmp_path, "model_name_or_path: m\ntrain_dataset_path: a.jsonl\nmax_steps: 7\nnum_train_epochs: 2\n")
    assert (got.config.train.steps, got.config.train.epochs) == (7, None)
    assert "max_steps says how long the run is" in told(got, "num_train_epochs")


@pytest.mark.parametrize("stage", ["DPO", "SFT", "KTO"])
def test_a_reference_that_is_never_refreshed(tmp_path: Path, stage: str) -> None:
    text = "model_name_or_path: m\ntrain_dataset_path: a.jsonl\nref_model_update_steps: -1\nbeta: 0.3\n"
    got = convert(tmp_path, f"{text}stage: {stage}\n")
    assert got.config.reference.refresh_steps == 0
    assert any(line.startswith("reference:") for line in got.report) == (stage == "SFT")


def test_what_the_file_leaves_out_is_as_there(tmp_path: Path) -> None:
    got = convert(tmp_path, "model_name_or_path: m\ntrain_dataset_path: a.jsonl\nmax_steps: 3\n")
    optimizer = got.config.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (5e-5, (0.9, 0.999), 0.0)
    assert got.config.schedule.kind == "linear"
    assert got.config.lora is not None
    assert got.report == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: VL-SFT\n", "stage is 'VL-SFT', expected one of dpo, kto"),
        ("max_steps: 3\n", "train_dataset_path is missing"),
        ("train_dataset_path: a,b,c\ntrain_dataset_prob: '0.5,0.5'\n", "3 paths in train_dataset_path, but 2 shares"),
        ("- a\n", "expected fields with values"),
        ("a: b: c\n", "no valid YAML or JSON"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path, text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        convert_erniekit(tmp_path / "none.yaml")
