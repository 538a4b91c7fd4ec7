"""The arms load and differ in one option; a few of them run from text to table, and go on where they stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ernie45.cli.main import main as ernie
from ernie45.config.run_file import read_run_file, to_plain
from ernie45.training.config import RunConfig
from ernie45.training.run_folder import _flat
from ernie45.training.state import checkpoint_paths
from recipes.ablations import arms, run, text
from recipes.ablations.arms import FOLDER, GROUPS, config_of

SPECIAL = ["<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"]
CHANGED = {
    "all": {},
    "no-orthogonal": {"loss.router.orthogonal": 0},
    "orthogonal-x300": {"loss.router.orthogonal": 0.3},
    "no-bias": {"balance.bias_rate": 0},
    "no-mtp": {"loss.mtp_weight": 0},
    "plain-mean": {},
    "token-balance": {"loss.token_balance": True},
}
QUICK = ["train.steps=3", "schedule.warmup_steps=0", "schedule.decay_start=null", "train.log_every=2"]


def flat(config: RunConfig) -> dict[str, Any]:
    return _flat(to_plain(config))


@pytest.mark.parametrize("group", GROUPS)
def test_arms_differ_from_their_base_in_one_option(group: str) -> None:
    first, *_ = GROUPS[group]
    for arm in GROUPS[group]:
        ours, base = flat(config_of(arm, 7, Path("out"))), flat(config_of(first, 7, Path("out")))
        assert {key: value for key, value in ours.items() if value != base[key]} == CHANGED[arm.name]
        assert (ours["train.seed"], ours["data.seed"]) == (7, 7)
        assert ours["model.start"] == (None if group == "pretrain" else "out/all-7")


def test_base_files_are_run_files_and_none_is_left_over() -> None:
    used = {arm.base for group in GROUPS.values() for arm in group}
    assert {path.name for path in FOLDER.glob("*.yaml")} == used
    base, mixed = (read_run_file(FOLDER / name, RunConfig) for name in ("base.yaml", "mixed.yaml"))
    assert base.model.network is not None
    assert base.model.network.moe is not None
    assert base.model.network.moe.moe_num_experts == 16
    assert (base.method, mixed.method) == ("pretrain", "sft")


def test_what_is_set_for_every_arm_does_not_undo_an_arm() -> None:
    arm = next(arm for arm in GROUPS["pretrain"] if arm.name == "no-bias")
    config = config_of(arm, 0, Path("out"), ["balance.bias_rate=0.5", "train.steps=200"])
    assert (config.balance.bias_rate, config.train.steps) == (0, 200)


@pytest.fixture
def prepared(tmp_path: Path, train_byte_level: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data, in which the recipe runs with three arms."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "HELD_OUT_SHARE", 0.2)
    monkeypatch.setattr(text, "MIN_MIXED_CHARS", 30)
    library = tmp_path / "library"
    library.mkdir()
    functions = [
        f'def f{i}(a, b={i}):\n    """Gives {i} words of a text, {"and more " * (i % 7)}."""\n' for i in range(80)
    ]
    (library / "words.py").write_text('"""Words."""\n' + "".join(functions))
    text.main(["-o", "data/ablations", "--library", str(library)])
    shutil.copytree(train_byte_level(["words of a text"] * 20, special=SPECIAL, bos="<s>"), "data/ablations/tokenizer")
    chosen = {"pretrain": ("all", "no-mtp"), "tune": ("token-balance",)}
    few = {group: tuple(arm for arm in GROUPS[group] if arm.name in names) for group, names in chosen.items()}
    for module in (arms, run):
        monkeypatch.setattr(module, "GROUPS", few)
    return tmp_path / "runs/ablations"


def test_from_text_to_tables(
    prepared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[str] = []
    draw = run.draw

    def draw_one(group: str, out: Path) -> int:
        """The group with a single run: pictures take longer than the runs."""
        drawn.append(group)
        return draw(group, out) if group == "tune" else 0

    monkeypatch.setattr(run, "draw", draw_one)
    assert run.main(["--seeds", "1", *QUICK]) == 0
    printed = capsys.readouterr().out
    assert (prepared / "tables.md").read_text().strip() in printed
    rows = [
        line.split(" | ") for line in printed.splitlines() if line.startswith(("| all", "| no-mtp", "| token-balance"))
    ]
    assert [row[0] for row in rows] == ["| all", "| no-mtp", "| token-balance"]
    agreement, without = (row[-2] for row in rows[:2])
    assert 0 <= float(agreement) <= 1
    assert without == "-"
    assert drawn == ["pretrain", "tune"]
    assert "token-balance-0" in (prepared / "report-tune/report.html").read_text()
    assert (prepared / "report-tune/loss.png").is_file()
    written = {folder.name: (folder / "metrics.jsonl").stat().st_mtime_ns for folder in prepared.glob("*-0")}
    assert written.keys() == {"all-0", "no-mtp-0", "token-balance-0"}
    monkeypatch.setattr(run, "draw", lambda group, out: 0)
    assert run.main(["--seeds", "1", *QUICK]) == 0
    again = capsys.readouterr()
    assert again.out.strip() == printed.split("report:")[0].strip(), "nothing ran again, so seconds are the same, too"
    assert again.err.count("goes on after step 3") == 3


def test_a_run_that_is_stopped_stops_the_others_and_goes_on(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = arms.GROUPS["pretrain"][0]
    long = [*QUICK, "checkpoint.every=2"]

    def killed(arguments: list[str]) -> int:
        """As one that did two steps and saved."""
        code = ernie(arguments)
        checkpoints = checkpoint_paths(Path(arguments[-1]) / "checkpoints")
        shutil.rmtree(checkpoints[-1])
        metrics = Path(arguments[-1]) / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
        return code

    monkeypatch.setattr(run, "ernie", killed)
    assert run.train(arm, 0, prepared, [*long, "checkpoint.keep=2"]) == 130
    monkeypatch.setattr(run, "ernie", ernie)
    assert run.train(arm, 0, prepared, [*long, "checkpoint.keep=2"]) == 0
    assert [path.name for path in checkpoint_paths(prepared / "all-0/checkpoints")][-1] == "step-00000003"


def test_a_failing_run_ends_it_with_its_code(prepared: Path) -> None:
    shutil.rmtree("data/ablations/tokenizer")
    assert run.main(["--seeds", "1", *QUICK]) not in (0, 130)
    assert not (prepared / "tables.md").exists()


def test_no_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--seeds", "0"])
    assert "--seeds is 0: expected 1 or more" in capsys.readouterr().err
