"""`ernie export`: runs, checkpoints and models into every format, adapters merged, copies compared, failures without traces."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import ernie45
from ernie45.checkpoint.atomic import partial_path
from ernie45.checkpoint.load import load_model
from ernie45.errors import CheckpointError, NotFoundError
from ernie45.store import export as exporting
from ernie45.store.compare import Comparison, compare_networks
from ernie45.store.convert import companions_of_folder
from ernie45.store.trained import Trained, find_trained
from ernie45.training.adapter_weights import AdapterWeights
from ernie45.training.lora.adapter import add_lora, merge
from ernie45.training.lora.config import LoraConfig
from ernie45.training.lora.read import load_adapter
from ernie45.training.lora.write import save_adapter
from ernie45.training.state import STATE_FILE, CheckpointConfig, Checkpoints, ModelWeights, Snapshot

Ernie = Callable[..., Any]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.fixture(scope="session")
def rich(save_random: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with prediction block and correction bias, and all that lies beside weights."""
    folder = save_random(tmp_path_factory.mktemp("rich") / "rich", moe=True, mtp=1, max_position_embeddings=256)
    (folder / "generation_config.json").write_text('{"temperature": 0.8}')
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (folder / "LICENSE").write_text("free")
    return folder


def trained(base: Path, folder: Path, *, named: bool = True, **fields: Any) -> Path:
    """An adapter that says something."""
    model = load_model(base)
    adapter = add_lora(model, LoraConfig(**fields), seed=0)
    with torch.no_grad():
        for i, lora in enumerate(adapter.values()):
            lora.lora_B.normal_(0, 0.05, generator=torch.Generator().manual_seed(i))
    save_adapter(adapter, model.config, folder, base=str(base) if named else None)
    (folder.parent / STATE_FILE).touch()
    return folder


def merged(base: Path, adapter: Path) -> Any:
    model = load_model(base)
    load_adapter(model, adapter)
    merge(model)
    return model


def test_the_newest_checkpoint_of_a_run(ernie: Ernie, rich: Path, tiny: Path, tmp_path: Path) -> None:
    for step, model in ((90, tiny), (100, rich), (20, tiny)):
        checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step:08}"
        shutil.copytree(model, checkpoint / "model")
        (checkpoint / STATE_FILE).touch()
    (tmp_path / "run" / "checkpoints" / "step-00000300").mkdir()  # what is half removed does not count
    (tmp_path / "run" / "checkpoints" / "step-00000200.partial").mkdir()
    result = ernie("export", "run", "out", "--to", "pt")
    assert result.code == 0, result.err
    assert "loaded back: largest logit difference 0 " in result.out
    assert "same best token at 100.0%" in result.out
    found, expected = tensors(tmp_path / "out"), tensors(rich)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (rich / name).read_bytes()
    assert ernie("export", "run/checkpoints/step-00000090", "other", "--to", "pt").code == 0
    assert tensors(tmp_path / "other").keys() == tensors(tiny).keys()


@pytest.mark.parametrize(("to", "target"), [("pt", "out"), ("paddle", "out"), ("gguf", "out.gguf")])
def test_an_adapter_is_merged_into_every_format(ernie: Ernie, rich: Path, tmp_path: Path, to: str, target: str) -> None:
    adapter = trained(rich, tmp_path / "run" / "checkpoints" / "step-00000007" / "adapter", mtp=True)
    result = ernie("export", "run", target, "--merge", "--to", to, "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["source"], report["adapter"], report["to_format"]) == (
        str(rich),
        str(adapter.relative_to(tmp_path)),
        to,
    )
    assert 0 < report["max_logit_difference"] <= report["tolerance"] < 0.1
    assert report["same_best_token"] == 1
    expected = merged(rich, adapter).state_dict()
    found = load_model(tmp_path / target).state_dict()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
    assert any(".mtp_" in name for name in found) == (to != "gguf")
    assert ("prediction block" in result.err) == (to == "gguf")
    text = "the quick brown fox"
    assert ernie45.load_tokenizer(tmp_path / target).encode(text) == ernie45.load_tokenizer(rich).encode(text)


def test_an_adapter_of_ones_own_and_another_dtype(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    trained(tiny, tmp_path / "a", named=False, dora=True)
    result = ernie("export", "tiny", "out", "--merge", "--adapter", "a", "--to", "pt", "--dtype", "bfloat16")
    assert result.code == 0, result.err
    assert "-> pt (bfloat16): out" in result.out
    expected = merged(tiny, tmp_path / "a").state_dict()
    for name, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        if name in expected:
            torch.testing.assert_close(tensor.float(), expected[name], rtol=2**-8, atol=1e-6)


def test_an_adapter_over_packed_weights(ernie: Ernie, tiny: Path, tmp_path: Path) -> None:
    assert ernie("quantize", "tiny", "--scheme", "wint8", "-o", "packed").code == 0
    adapter = trained(tmp_path / "packed", tmp_path / "a")
    result = ernie("export", "packed", "out", "--merge", "--adapter", "a", "--to", "pt")
    assert result.code == 0, result.err
    model = load_model(tmp_path / "packed")
    load_adapter(model, adapter)
    with torch.no_grad():
        ids = torch.arange(20)[None]
        torch.testing.assert_close(load_model(tmp_path / "out")(ids), model(ids), rtol=1e-4, atol=1e-4)


def test_transformers_loads_and_agrees(ernie: Ernie, rich: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    trained(rich, tmp_path / "step" / "adapter")
    assert ernie("export", "step", "out", "--merge", "--to", "pt").code == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(7, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load_model(tmp_path / "out")(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", ["out", "out.gguf"])
def test_a_copy_that_computes_something_else_is_not_kept(
    ernie: Ernie, tiny: Path, tmp_path: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that is wrong must not get through, and what was there stays."""
    trained(tiny, tmp_path / "a")
    to = "gguf" if target.endswith(".gguf") else "pt"
    assert ernie("export", "tiny", target, "--to", to).code == 0
    before = {p.name: p.read_bytes() for p in ([tmp_path / target] if to == "gguf" else (tmp_path / target).iterdir())}
    names = sorted(path.name for path in tmp_path.iterdir())
    right: Any = exporting._merged

    def wrong(*parts: Any) -> Any:
        source = right(*parts)
        for lora in source._adapter.values():
            lora.lora_B.data *= 2
        return source

    monkeypatch.setattr(exporting, "_merged", wrong)
    result = ernie("export", "tiny", target, "--merge", "--adapter", "a", "--to", to, "--force")
    assert result.code == 1
    assert result.err.startswith("error: the copy was not kept: its logits differ by up to ")
    after = {p.name: p.read_bytes() for p in ([tmp_path / target] if to == "gguf" else (tmp_path / target).iterdir())}
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == names, "nothing lies around"


def test_comparing_looks_at_everything(small_model: Callable[..., Any]) -> None:
    """A change of any one parameter, prediction block and correction bias included, is seen."""
    reference = small_model(moe=True, mtp=1)
    assert compare_networks(reference, small_model(moe=True, mtp=1), "float32").max_difference == 0
    for name in reference.state_dict():
        other = small_model(moe=True, mtp=1)
        with torch.no_grad():
            other.state_dict()[name].add_(
                0.5 * torch.randn(other.state_dict()[name].shape, generator=torch.Generator().manual_seed(2))
            )
        assert not compare_networks(reference, other, "float32").ok, name
    assert not Comparison(max_difference=float("nan"), tolerance=1.0, same_best_token=0.0).ok
    tolerances = [
        compare_networks(reference, reference, dtype).tolerance for dtype in ("float32", "float16", "bfloat16")
    ]
    assert tolerances == sorted(tolerances)


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["tiny", "out", "--to", "gguf"], 2, "must end in .gguf"),
        (["nothing", "out", "--to", "pt"], 4, "no model 'nothing' here"),
        (["tiny", "out", "--to", "pt", "--merge"], 2, "has no adapter to merge"),
        (["step", "out", "--to", "pt"], 2, "say --merge"),
        (["step", "out", "--to", "pt", "--merge", "--adapter", "step/adapter"], 2, "leave --adapter out"),
        (["tiny", "out", "--to", "pt", "--merge", "--adapter", "gone"], 4, "gone is no adapter"),
        (["lost", "out", "--to", "pt", "--merge"], 4, "does not say which model"),
        (["empty", "out", "--to", "pt"], 4, "holds no checkpoint"),
        (
            ["tiny", "out", "--to", "pt", "--average"],
            2,
            "tiny keeps no average of what it trained: leave --average out",
        ),
        (["step", "out", "--to", "pt", "--merge", "--average"], 2, "train with a section ema in the run file"),
        (["tiny", "taken", "--to", "pt"], 1, "replace it with --force"),
    ],
)
def test_what_cannot_be_exported(
    ernie: Ernie, tiny: Path, tmp_path: Path, argv: list[str], code: int, message: str
) -> None:
    trained(tiny, tmp_path / "step" / "adapter", targets=("o_proj",))
    trained(tiny, tmp_path / "lost" / "adapter", targets=("o_proj",), named=False)
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    (tmp_path / "taken").mkdir()
    result = ernie("export", *argv)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_network_in_memory_is_saved_with_everything(
    small_model: Callable[..., Any], rich: Path, tmp_path: Path
) -> None:
    """What training calls for its checkpoints: bit for bit, companions included."""
    model = small_model(moe=True, mtp=1, vocab_size=320, dtype=torch.bfloat16)
    ernie45.save_model(model, tmp_path / "m", tokenizer_from=rich)
    again = load_model(tmp_path / "m", "auto")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
        narrow = not name.endswith(("gate.weight", "correction_bias"))
        assert tensor.dtype == again.state_dict()[name].dtype == (torch.bfloat16 if narrow else torch.float32)
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "m" / name).read_bytes() == (rich / name).read_bytes()
    add_lora(model, LoraConfig(), seed=0)
    with pytest.raises(CheckpointError, match="merge an adapter first"):
        ernie45.save_model(model, tmp_path / "n")
    assert not (tmp_path / "n").exists()


def test_what_training_saves_is_what_is_exported(ernie: Ernie, rich: Path, tmp_path: Path) -> None:
    model = load_model(rich)
    checkpoints = tmp_path / "run" / "checkpoints"
    files = companions_of_folder(rich)
    keeper = Checkpoints(checkpoints, ModelWeights(model, files), CheckpointConfig())
    keeper.save(Snapshot(step=1, values={}, tensors={}))
    assert find_trained(tmp_path / "run") == Trained(base=checkpoints / "step-00000001" / "model")
    add_lora(model, LoraConfig(), seed=0)
    weights = AdapterWeights(model, base=str(rich), extra_files=files)
    Checkpoints(checkpoints, weights, CheckpointConfig()).save(Snapshot(step=2, values={}, tensors={}))
    adapter = checkpoints / "step-00000002" / "adapter"
    assert find_trained(tmp_path / "run") == Trained(base=rich, adapter=adapter)
    assert (adapter / "tokenizer.json").read_bytes() == (rich / "tokenizer.json").read_bytes()
    assert ernie("export", "run", "out", "--merge", "--to", "pt").code == 0
    found, expected = tensors(tmp_path / "out"), tensors(rich)
    assert all(torch.equal(found[name], expected[name]) for name in expected), "its B is zero"


def test_what_a_killed_export_left_is_cleared_away(ernie: Ernie, tmp_path: Path) -> None:
    for target, to in (("out.gguf", "gguf"), ("out", "pt")):
        mine = partial_path(tmp_path / target)
        owner = mine.name.split("partial-")[1].split("-")[0]
        left = mine.with_name(mine.name.replace(owner, "4194305.1"))  # no process has a number above 4194304
        left.mkdir()
        (left / "half").write_text("half")
        assert ernie("export", "tiny", target, "--to", to).code == 0
        assert not left.exists()


def test_runs_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(NotFoundError, match="has the run saved one"):
        find_trained(tmp_path / "run")
