"""Vision encoder and resampler against transformers with random weights, and against published and hand-made values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as theirs

from ernie45.config.count import count_parameters
from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.config.presets import preset
from ernie45.errors import ConfigError, ShapeError
from ernie45.models.init import initialize
from ernie45.models.vision import Grid, Resampler, VisionEncoder, patch_angles, quick_gelu, read_grids

VISION = VisionConfig(
    depth=2, hidden_size=32, num_heads=2, intermediate_size=48, patch_size=4, freq_allocation=2, layer_norm_eps=1e-4
)
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    rms_norm_eps=1e-2,  # far from the LayerNorms' 1e-4, so that taking one for the other shows
    moe=MoeConfig(moe_num_experts=4, moe_k=2, moe_intermediate_size=8, moe_vision_intermediate_size=8),
    vision=VISION,
)
GRIDS = [
    [[1, 4, 6]],
    [[1, 2, 2], [1, 6, 4], [1, 2, 8]],
    [[4, 4, 2]],
    [[1, 4, 4], [6, 2, 4], [2, 2, 2], [1, 2, 2]],
]
# Float32 rounding over two blocks of unit-sized values; the sums run in another order than theirs.
TOLERANCE = 5e-6


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Every parameter away from its neutral value: norm weights around 1, everything else around 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        is_norm_weight = parameter.ndim == 1 and name.endswith("weight")
        spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
        drawn = spread * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn + (1 if is_norm_weight else 0))


def random_rows(grids: list[list[int]], width: int, seed: int = 1) -> Tensor:
    num_rows = sum(math.prod(grid) for grid in grids)
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))


def their_config() -> Any:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "rms_norm_eps": VISION.layer_norm_eps,
    }
    text = {"hidden_size": 24, "rms_norm_eps": CONFIG.rms_norm_eps}
    return Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    model = VisionEncoder(VISION)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def resampler() -> Resampler:
    model = Resampler(CONFIG)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_encoder_equals_transformers(encoder: VisionEncoder, grids: list[list[int]]) -> None:
    reference = theirs.Ernie4_5_VLMoeVisionTransformerPretrainedModel(their_config().vision_config)
    reference.load_state_dict(encoder.state_dict(), strict=True)
    reference.set_attn_implementation("eager")  # plain matrix products and softmax, not the kernel that ours calls
    rows, grid_thw = random_rows(grids, 48), torch.tensor(grids)
    expected = reference.eval()(rows, grid_thw).last_hidden_state
    assert expected.std() > 0.3
    assert (encoder(rows, grid_thw) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("grids", GRIDS)
@torch.no_grad()
def test_resampler_equals_transformers(resampler: Resampler, grids: list[list[int]]) -> None:
    reference = theirs.Ernie4_5_VLMoeVariableResolutionResamplerModel(their_config())
    names = {"0": "fc1", "2": "fc2", "3": "ln"}
    state = {}
    for name, tensor in resampler.state_dict().items():
        parts = name.split(".")
        state[".".join([parts[0], names.get(parts[1], parts[1]), *parts[2:]])] = tensor
    reference.load_state_dict(state, strict=True)
    x, grid_thw = random_rows(grids, 32), torch.tensor(grids)
    expected = reference.eval()(x, grid_thw)
    features = resampler(x, grid_thw)
    assert features.shape == (sum(h * w // 4 * (1 if t == 1 else t // 2) for t, h, w in grids), 24)
    assert (features - expected).abs().max() <= TOLERANCE


def test_rotary_frequencies_of_the_published_encoder() -> None:
    published = VisionConfig()
    angles = patch_angles([Grid(1, 4, 6)], published)
    assert angles.shape == (24, 40)
    # Rows of the first window: (row, column) = (0, 0), (0, 1), (1, 0), (1, 1); the second window starts at (0, 2).
    assert angles[0].abs().max() == 0
    g = angles[1, 20:]
    torch.testing.assert_close(g[[0, 1, 19]], torch.tensor([1.0, 0.6309573445, 1.584893192e-4]), rtol=1e-6, atol=0)
    torch.testing.assert_close(angles[2], torch.cat((g, torch.zeros(20))))
    torch.testing.assert_close(angles[3], torch.cat((g, g)))
    torch.testing.assert_close(angles[4], torch.cat((torch.zeros(20), 2 * g)))
    torch.testing.assert_close(angles[-1], torch.cat((3 * g, 5 * g)))
    two_frames = patch_angles([Grid(2, 4, 6)], published)
    assert torch.equal(two_frames, torch.cat((angles, angles)))


def test_quick_gelu() -> None:
    torch.testing.assert_close(
        quick_gelu(torch.tensor(1.0, dtype=torch.float64)).item(), 0.8457957659, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(("name", "expected"), [("VL-28B-A3B", 144_225_280), ("VL-424B-A47B", 173_072_384)])
def test_parameter_counts_of_the_published_models(name: str, expected: int) -> None:
    config = preset(name)
    assert config.vision is not None
    with torch.device("meta"):
        encoder, resampler = VisionEncoder(config.vision), Resampler(config)
    counts = [sum(parameter.numel() for parameter in module.parameters()) for module in (encoder, resampler)]
    assert counts == [630_433_280, expected]
    assert sum(counts) == count_parameters(config).vision


def test_names_are_the_published_ones(encoder: VisionEncoder, resampler: Resampler) -> None:
    def both(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    block = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    blocks = [f"blocks.{i}.{name}" for i in range(2) for name in block]
    assert set(encoder.state_dict()) == {"patch_embed.proj.weight"} | both("ln", *blocks)
    linears = [f"{stage}_linear.{i}" for stage in ("spatial", "temporal") for i in (0, 2, 3)]
    assert set(resampler.state_dict()) == {"after_norm.weight"} | both("mlp", *linears)


GRID = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4]), st.sampled_from([2, 6]))


@settings(deadline=None, max_examples=20)
@given(st.lists(GRID, min_size=1, max_size=4), st.integers(0, 1000))
@torch.no_grad()
def test_frames_never_see_each_other(encoder: VisionEncoder, grids: list[tuple[int, int, int]], seed: int) -> None:
    rows = random_rows([list(grid) for grid in grids], 48, seed)
    together = encoder(rows, torch.tensor(grids))
    frames = [(1, h, w) for t, h, w in grids for _ in range(t)]
    parts = torch.split(rows, [h * w for _, h, w in frames])
    alone = [encoder(part, torch.tensor([frame])) for part, frame in zip(parts, frames, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_an_image_equals_two_equal_frames(encoder: VisionEncoder, resampler: Resampler) -> None:
    image = random_rows([[1, 4, 6]], 48)
    one, two = torch.tensor([[1, 4, 6]]), torch.tensor([[2, 4, 6]])
    as_image = resampler(encoder(image, one), one)
    as_video = resampler(encoder(torch.cat((image, image)), two), two)
    assert as_image.shape == as_video.shape == (6, 24)
    torch.testing.assert_close(as_image, as_video, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_bfloat16_stays_near_float32(encoder: VisionEncoder, resampler: Resampler) -> None:
    narrow_encoder, narrow_resampler = VisionEncoder(VISION, torch.bfloat16), Resampler(CONFIG, torch.bfloat16)
    narrow_encoder.load_state_dict(encoder.state_dict())
    narrow_resampler.load_state_dict(resampler.state_dict())
    rows, grid_thw = random_rows([[4, 6, 8]], 48), torch.tensor([[4, 6, 8]])
    narrow = narrow_resampler(narrow_encoder(rows, grid_thw), grid_thw)
    wide = resampler(encoder(rows, grid_thw), grid_thw)
    assert narrow.dtype == torch.bfloat16
    assert (narrow.float() - wide).square().mean().sqrt() < 0.03 * wide.square().mean().sqrt()


def test_gradients_reach_every_parameter(encoder: VisionEncoder, resampler: Resampler) -> None:
    grid_thw = torch.tensor([[1, 2, 2], [2, 2, 4]])
    resampler(encoder(random_rows([[1, 2, 2], [2, 2, 4]], 48), grid_thw), grid_thw).square().sum().backward()
    for name, parameter in [*encoder.named_parameters(), *resampler.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        parameter.grad = None


def test_initialize_fills_every_parameter() -> None:
    for module in (VisionEncoder(VISION), Resampler(CONFIG)):
        for parameter in module.parameters():
            parameter.data.fill_(float("nan"))
        initialize(module, std=0.02)
        for name, parameter in module.named_parameters():
            assert parameter.isfinite().all(), name


@pytest.mark.parametrize(
    ("grid_thw", "message"),
    [
        (torch.tensor([1, 4, 4]), r"shape \(3,\)"),
        (torch.tensor([[4, 4]]), r"shape \(1, 2\)"),
        (torch.empty(0, 3, dtype=torch.int64), r"shape \(0, 3\)"),
        (torch.tensor([[1.0, 4.0, 4.0]]), "float32"),
        (torch.tensor([[1, 4, 4], [1, 5, 4]]), "item 1 has a grid of 1 x 5 x 4 .* multiples of 2.* 8 pixels"),
        (torch.tensor([[1, 4, 3]]), "1 x 4 x 3"),
        (torch.tensor([[0, 4, 4]]), "0 x 4 x 4"),
        (torch.tensor([[1, -2, 4]]), "1 x -2 x 4"),
        (torch.tensor([[3, 4, 4]]), "item 0 has 3 frames, expected 1 .* multiple of 2"),
    ],
)
def test_bad_grids(grid_thw: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        read_grids(grid_thw, VISION)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(16, 47), r"\(16, 47\).*\(16, 48\)"),
        (torch.zeros(15, 48), r"\(15, 48\).*\(16, 48\)"),
        (torch.zeros(16, 3, 4, 4), r"\(16, 3, 4, 4\).*\(16, 48\)"),
        (torch.zeros(16, 48, dtype=torch.uint8), "uint8.*normalised"),
    ],
)
def test_bad_rows(encoder: VisionEncoder, rows: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        encoder(rows, torch.tensor([[1, 4, 4]]))


def test_bad_input_of_the_resampler(resampler: Resampler) -> None:
    with pytest.raises(ShapeError, match=r"encoded patches .*\(16, 30\).*\(16, 32\)"):
        resampler(torch.zeros(16, 30), torch.tensor([[1, 4, 4]]))
    with pytest.raises(ShapeError, match=r"\(16, 32\).*\(32, 32\)"):
        resampler(torch.zeros(16, 32), torch.tensor([[2, 4, 4]]))
    with pytest.raises(ConfigError, match="text model"):
        Resampler(preset("0.3B"))
