"""Whole runs through the command line: their folder, going on after stops and kills, and what is said to mistakes."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ernie45
from ernie45.checkpoint.load import load_model
from ernie45.cli import train as train_verb
from ernie45.cli.main import main
from ernie45.training.state import checkpoint_paths, read_checkpoint

RunFile = Callable[..., Path]
_TIMED = ("time_s", "tokens_per_s", "mfu", "data_share", "memory_bytes")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def figures(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on stops: everything but times and memory."""
    return [{key: value for key, value in line.items() if key not in _TIMED} for line in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint: the model's, the optimizer's and whatever else it holds."""
    newest = checkpoint_paths(folder / "checkpoints")[-1]
    found = {
        f"{file}.{name}": t for file, group in read_checkpoint(newest).tensors.items() for name, t in group.items()
    }
    return found | dict(load_model(newest / "model").state_dict())


def assert_same_run(a: Path, b: Path) -> None:
    assert figures(a) == figures(b)
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def train(*arguments: str | Path) -> int:
    return main(["train", *map(str, arguments)])


def test_a_run_learns_and_leaves_what_is_promised(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(
        train={"steps": 30, "rows_per_pass": 2, "eval_every": 10}, data={"split": [0.9, 0.1, 0]}, ema={"decay": 0.9}
    )
    assert train(path, "--run", tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "pretrain of" in said
    assert "step 30/30  loss" in said
    assert "done: 30 steps" in said
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.6 * lines[0]["loss"]
    assert lines[-1]["eval/loss"] < lines[0]["loss"]
    assert {"mtp_loss", "balance_loss", "expert_load", "router_entropy"} <= lines[0].keys()
    assert 0 < lines[5]["mfu"] < 1
    run = json.loads((tmp_path / "run/run.json").read_text())
    assert run["method"] == "pretrain"
    assert run["num_parameters"] > run["num_active"] > 0
    (newest,) = checkpoint_paths(tmp_path / "run/checkpoints")
    assert {file.name for file in newest.iterdir()} >= {
        "model",
        "optimizer.safetensors",
        "ema.safetensors",
        "rng.safetensors",
    }
    assert main(["chat", str(newest / "model"), "--raw", "the moon", "--max-tokens", "4"]) == 0


def test_a_first_loss_that_random_weights_do_not_have_is_told(
    run_file: RunFile, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(run_file(train={"steps": 2}), "--run", tmp_path / "a") == 0
    assert "the first loss" not in caplog.text
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(320), rel=0.02)
    assert train(run_file(train={"steps": 2}), "model.network.initializer_range=0.9", "--run", tmp_path / "b") == 0
    assert "random weights should give ln(vocabulary) = 5.768" in caplog.text


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_every_method_runs_and_goes_on(run_file: RunFile, tmp_path: Path, method: str) -> None:
    path = run_file(method=method, train={"steps": 4, "rows_per_pass": 2}, checkpoint={"every": 2})
    assert train(path, "--run", tmp_path / "whole") == 0
    assert train(path, "--run", tmp_path / "parts") == 0
    remove_newest(tmp_path / "parts")
    assert train(path, "--run", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("advantages", ["group", "gae"])
def test_answers_are_sampled_judged_and_learnt_from(run_file: RunFile, tmp_path: Path, advantages: str) -> None:
    path = run_file(
        method="upo",
        train={"steps": 4, "rows_per_pass": 2},
        upo={"advantages": advantages, "preference_weight": 0.5, "kl_weight": 0.1},
        rollout={"num_answers": 4, "max_tokens": 8, "num_minibatches": 2},
        rewards=[{"function": "length", "options": {"maximum": 10, "margin": 20}}],
        checkpoint={"every": 1, "keep": 4},
    )
    assert train(path, "--run", tmp_path / "whole") == 0
    assert train(path, "--run", tmp_path / "parts") == 0
    for _ in range(3):  # step 1 lies within a rollout
        remove_newest(tmp_path / "parts")
    assert train(path, "--run", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(0 <= line["rewards/score"] <= 1 for line in metrics(tmp_path / "whole"))


def test_rollouts_in_8_bits_are_near_the_policy_and_go_on(run_file: RunFile, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "method": "upo",
        "train": {"steps": 4, "rows_per_pass": 2},
        "rewards": [{"function": "length", "options": {"maximum": 10, "margin": 20}}],
        "checkpoint": {"every": 1, "keep": 4},
    }
    rollout = {"num_answers": 4, "max_tokens": 8, "num_minibatches": 2}
    exact = run_file("exact.yaml", rollout=rollout, **fields)
    packed = run_file("packed.yaml", rollout={**rollout, "weights": "wint8"}, upo={"sampler_ratio_cap": 2.0}, **fields)
    assert train(exact, "--run", tmp_path / "exact") == 0
    assert train(packed, "--run", tmp_path / "whole") == 0
    assert train(packed, "--run", tmp_path / "parts") == 0
    for _ in range(3):  # step 1 lies within a rollout
        remove_newest(tmp_path / "parts")
    assert train(packed, "--run", tmp_path / "parts") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    first, rounded = (metrics(tmp_path / name)[0] for name in ("exact", "whole"))
    assert first["policy/sampler_kl"] < 1e-7 < rounded["policy/sampler_kl"] < 1e-2
    assert rounded["policy/sampler_ratio"] == pytest.approx(1.0, abs=0.05)
    assert "policy/sampler_ratio" not in first


def test_answers_and_pairs_of_a_data_set_are_learnt_from_together(run_file: RunFile, tmp_path: Path) -> None:
    run_file("pairs.yaml", method="dpo")  # writes the rows
    path = run_file(
        method="upo",
        train={"steps": 2, "rows_per_pass": 2},
        upo={"preference_weight": 0.5, "pair_source": "offline", "pair_ratio": 1.0},
        rollout={"num_answers": 2, "max_tokens": 4},
        rewards=[{"function": "length", "options": {"maximum": 10}}],
        pairs={"train": [{"path": str(tmp_path / "dpo.jsonl")}], "max_seq_len": 160},
    )
    assert train(path, "--run", tmp_path / "run") == 0
    assert all(line["rewards/accuracy"] >= 0 for line in metrics(tmp_path / "run"))


def test_products_in_fp8_learn_as_well(run_file: RunFile, tmp_path: Path) -> None:
    fields = {"train": {"steps": 12, "rows_per_pass": 2}}
    assert train(run_file("a.yaml", **fields), "--run", tmp_path / "a") == 0
    assert train(run_file("b.yaml", fp8={}, **fields), "--run", tmp_path / "b") == 0
    a, b = ([line["loss"] for line in metrics(tmp_path / name)] for name in "ab")
    assert a[:3] != b[:3], "the option does something"
    assert b == pytest.approx(a, rel=0.05)


def remove_newest(folder: Path) -> None:
    """As if the run had been killed before its last checkpoint."""
    (checkpoint_paths(folder / "checkpoints")[-1] / "state.json").unlink()


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_adapters_train_and_go_on(run_file: RunFile, tmp_path: Path, method: str) -> None:
    assert train(run_file("base.yaml"), "--run", tmp_path / "base") == 0
    base = checkpoint_paths(tmp_path / "base/checkpoints")[-1] / "model"
    path = run_file(
        method=method,
        model={"start": str(base), "network": None, "tokenizer": None},
        lora={"rank": 4, "lora_plus_scale": 4.0},
        checkpoint={"every": 2},
        train={"steps": 4},
    )
    assert train(path, "--run", tmp_path / "whole") == 0
    assert train(path, "--run", tmp_path / "parts") == 0
    remove_newest(tmp_path / "parts")
    assert train(path, "--run", tmp_path / "parts") == 0
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    folders = [checkpoint_paths(tmp_path / name / "checkpoints")[-1] for name in ("whole", "parts")]
    a, b = ((folder / "adapter/adapter_model.safetensors").read_bytes() for folder in folders)
    assert a == b
    assert not (folders[0] / "model").exists()


def test_the_second_factors_own_rate_is_felt(run_file: RunFile, tmp_path: Path) -> None:
    assert train(run_file("base.yaml"), "--run", tmp_path / "base") == 0
    base = checkpoint_paths(tmp_path / "base/checkpoints")[-1] / "model"
    losses = {}
    for scale in (1.0, 16.0):
        path = run_file(
            f"{scale}.yaml",
            method="sft",
            model={"start": str(base), "network": None, "tokenizer": None},
            lora={"rank": 4, "lora_plus_scale": scale},
            train={"steps": 3},
        )
        assert train(path, "--run", tmp_path / str(scale)) == 0
        losses[scale] = [line["loss"] for line in metrics(tmp_path / str(scale))]
    assert losses[1.0][0] == losses[16.0][0]
    assert losses[1.0][2] != losses[16.0][2]


@pytest.mark.parametrize("lora", [False, True])
def test_the_average_of_a_run_is_exported(run_file: RunFile, tmp_path: Path, lora: bool) -> None:
    assert train(run_file("base.yaml", ema={"decay": 0.9}), "--run", tmp_path / "run") == 0
    if lora:
        model = {"start": str(tmp_path / "run"), "network": None, "tokenizer": None}
        path = run_file(method="sft", model=model, lora={"rank": 4}, ema={"decay": 0.9})
        assert train(path, "--run", tmp_path / "run2") == 0
    run, merge = (tmp_path / "run2", ["--merge"]) if lora else (tmp_path / "run", [])
    (newest,) = checkpoint_paths(run / "checkpoints")
    averages = read_checkpoint(newest).tensors["ema"]
    assert main(["export", str(run), str(tmp_path / "out"), "--average", "--to", "pt", *merge]) == 0
    assert main(["export", str(run), str(tmp_path / "last"), "--to", "pt", *merge]) == 0
    copy, last = (load_model(tmp_path / name).state_dict() for name in ("out", "last"))
    if not lora:
        assert all(torch.equal(copy[name], average) for name, average in averages.items())
    changed = {name for name in copy if not torch.equal(copy[name], last[name])}
    trained = {re.sub(r"_lora\.\w+$", "_proj", re.sub(r"\.lora\.\w+$", ".weight", name)) for name in averages}
    assert changed == trained, "all of it, and nothing else"


def test_an_adapter_says_from_anywhere_what_it_belongs_to(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is named as the folder of a run, relative to where training began; it is exported from elsewhere."""
    monkeypatch.chdir(tmp_path)
    assert train(run_file("base.yaml"), "--run", "base") == 0
    model = {"start": "base", "network": None, "tokenizer": None}
    assert train(run_file(method="sft", model=model, lora={"rank": 4}), "--run", "tuned") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["export", "../tuned", "out", "--merge", "--to", "pt"]) == 0
    (adapter,) = checkpoint_paths(tmp_path / "tuned" / "checkpoints")
    assert (adapter / "adapter/tokenizer.json").read_bytes() == Path("out/tokenizer.json").read_bytes()


def test_freed_memory_goes_back_if_asked(
    run_file: RunFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The allocator itself has a test of its own; here it must be asked, once, and only where the run says so."""
    asked: list[bool] = []

    def setting() -> bool:
        asked.append(True)
        return len(asked) > 1

    kept: list[bool] = []
    monkeypatch.setattr(train_verb, "return_freed_memory", setting)
    monkeypatch.setattr(train_verb, "keep_freed_memory", lambda: kept.append(True))
    assert train(run_file(train={"steps": 3}), "--run", tmp_path / "a") == 0
    assert not asked
    assert kept == [True], "by default it is kept"
    path = run_file(train={"steps": 3}, returns_memory=True)
    for name, has_note in (("b", True), ("c", False)):
        assert train(path, "--run", tmp_path / name) == 0
        assert ("returns_memory has no effect" in capsys.readouterr().err) == has_note
    assert len(asked) == 2
    assert len(kept) == 1


def test_a_run_that_is_killed_again_and_again_ends_the_same(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(train={"steps": 40}, checkpoint={"every": 3, "asynchronous": True}, ema={"decay": 0.9})
    assert train(path, "--run", tmp_path / "whole") == 0
    rng = random.Random(0)
    kills = 0
    while True:
        process = start(path, tmp_path / "killed")
        deadline = time.monotonic() + 60
        seen = len_metrics(tmp_path / "killed")
        target = seen + rng.randint(2, 14)
        while process.poll() is None and len_metrics(tmp_path / "killed") < target and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0, process.communicate()[1]
    assert kills >= 2
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_saves_and_the_same_command_goes_on(run_file: RunFile, tmp_path: Path) -> None:
    path = run_file(train={"steps": 60})
    assert train(path, "--run", tmp_path / "whole") == 0
    process = start(path, tmp_path / "stopped")
    while len_metrics(tmp_path / "stopped") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopping: finishing this step and saving" in said
    assert "the same command goes on from there" in said
    done = len_metrics(tmp_path / "stopped")
    assert 3 <= done < 60
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == list(range(1, done + 1))
    assert train(path, "--run", tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def start(path: Path, folder: Path) -> subprocess.Popen[str]:
    """The command in a process of its own, with as many threads as this one."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(ernie45.__file__).parents[1]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "ernie45.cli.main", "train", str(path), "--run", str(folder)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def len_metrics(folder: Path) -> int:
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def test_accumulation_makes_the_step_of_larger_passes(run_file: RunFile, tmp_path: Path) -> None:
    without = {"loss": {"router": {"balance": 0.0}}, "optimizer": {"lr": 1e-3}}  # a mean over each pass
    assert train(run_file("a.yaml", train={"steps": 3, "rows_per_pass": 4}, **without), "--run", tmp_path / "a") == 0
    assert train(run_file("b.yaml", train={"steps": 3, "accumulation": 4}, **without), "--run", tmp_path / "b") == 0
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    for name in ("loss", "mtp_loss", "grad_norm"):
        assert [line[name] for line in b] == pytest.approx([line[name] for line in a], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        (
            ["optimizer.lrr=1"],
            1,
            r"command line (optimizer.lrr): optimizer.lrr is no key of a run file: did you mean lr?",
        ),
        (["method=sftt"], 1, "method is 'sftt', expected one of pretrain, sft"),
        (["model.network.vocab_size=100"], 1, "the tokenizer has 320 tokens, the network 100: set network.vocab_size"),
        (["model.start=nothing-here"], 1, "start and network given: name one of"),
        (["preference.beta=0.5"], 1, "preference is set but the method is pretrain"),
        (["pairs={train: [{path: a.jsonl}]}"], 1, "pairs is set but the method is pretrain"),
        (["optimizer.lora_plus_scale=4"], 1, "it belongs into the section lora"),
        (["fp8={}", "lora={}"], 1, "fp8 is for weights that learn by pretrain or sft"),
        (["reference.refresh_steps=3"], 1, "reference is set but the method is pretrain"),
        (["train.eval_every=1"], 1, "there are no valid rows"),
        (["data.train=[{path: none.jsonl}]"], 4, "none.jsonl"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: list[str], code: int, message: str
) -> None:
    assert train(run_file(), *settings, "--run", tmp_path / "run") == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_its_configuration(
    run_file: RunFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = run_file(train={"steps": 2}), tmp_path / "run"
    assert train(path, "--run", folder) == 0
    capsys.readouterr()
    assert train(path, "optimizer.lr=0.5", "--run", folder) == 1
    assert "optimizer.lr was 0.01, now 0.5; choose another folder with --run" in capsys.readouterr().err
    assert train(path, "train.log_every=2", "--run", folder) == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("x")
    assert train(path, "--run", tmp_path / "other") == 1
    assert "holds files but no run" in capsys.readouterr().err


def test_the_schema_and_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--schema") == 0
    out = capsys.readouterr().out
    assert all(
        f"\n{name}:" in f"\n{out}" for name in ("method", "model", "data", "train", "optimizer", "lora", "recompute")
    )
    assert train() == 2
    assert "name a run file" in capsys.readouterr().err
