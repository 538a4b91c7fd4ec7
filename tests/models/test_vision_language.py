"""The vision-language network against transformers with random weights, and its invariants."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from ernie45.config.count import count_parameters
from ernie45.config.model import ModelConfig, MoeConfig, VisionConfig
from ernie45.config.presets import preset
from ernie45.errors import ConfigError, ShapeError
from ernie45.layers.cache import AttentionView
from ernie45.layers.moe import MoeBlock
from ernie45.models.init import initialize
from ernie45.models.mrope_positions import mrope_positions
from ernie45.models.text import CausalLM
from ernie45.models.vision_language import VisionLanguageModel

IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = range(90, 96)
PATCH_WIDTH = 48
VISION = VisionConfig(
    depth=2,
    hidden_size=32,
    num_heads=2,
    intermediate_size=48,
    patch_size=4,
    freq_allocation=3,
    im_patch_id=IMAGE,
    video_patch_id=VIDEO,
    image_start_token_id=IMAGE_START,
    image_end_token_id=IMAGE_END,
    video_start_token_id=VIDEO_START,
    video_end_token_id=VIDEO_END,
)
MOE = MoeConfig(
    moe_num_experts=6,
    moe_k=2,
    moe_intermediate_size=12,
    moe_num_shared_experts=2,
    moe_layer_start_index=1,
    moe_layer_end_index=29,
    moe_vision_intermediate_size=8,
)
TIED = ModelConfig(
    vocab_size=100,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=22,  # 11 frequencies, of which 3 for time
    moe=MOE,
    vision=VISION,
)
# As the larger published model: no shared experts, a head of its own.
UNTIED = dataclasses.replace(
    TIED, tie_word_embeddings=False, moe=dataclasses.replace(MOE, moe_num_shared_experts=0, moe_layer_start_index=2)
)
# Logits are of unit size and pass four layers; float32 sums run in another order than theirs.
TOLERANCE = 2e-5

Part = list[int] | tuple[int, int, int]


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Parameters away from their neutral values, and correction biases large enough to change the choice of experts."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        is_norm_weight = tensor.ndim == 1 and name.endswith("weight")
        spread = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
        drawn = spread * torch.randn(tensor.shape, generator=generator)
        tensor.data.copy_(drawn + (1 if is_norm_weight else 0))


def build(config: ModelConfig) -> VisionLanguageModel:
    model = VisionLanguageModel(config)
    randomise(model)
    return model.eval()


def prompt(*parts: Part, video_id: int = VIDEO) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, patch rows and grids of a sequence. A list is text, a triple (t, h, w) an image or video with delimiters."""
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, list):
            ids += part
            continue
        t, h, w = part
        grids.append(part)
        first, slot, last = (IMAGE_START, IMAGE, IMAGE_END) if t == 1 else (VIDEO_START, video_id, VIDEO_END)
        ids += [first, *[slot] * (max(t // 2, 1) * h * w // 4), last]
    grid_thw = torch.tensor(grids)
    rows = torch.randn(int(grid_thw.prod(-1).sum()), PATCH_WIDTH, generator=torch.Generator().manual_seed(3))
    return torch.tensor(ids), rows, grid_thw


def to_transformers(model: VisionLanguageModel) -> Any:
    """The same weights in their network, under the names of architecture reference 4.5."""
    config, moe = model.config, model.config.moe
    assert moe is not None
    layer_types = ["sparse" if config.is_moe_layer(i) else "dense" for i in range(config.num_hidden_layers)]
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "tie_word_embeddings",
    )
    text = {
        **{key: getattr(config, key) for key in same},
        "moe_intermediate_size": [moe.moe_intermediate_size, moe.moe_vision_intermediate_size],
        "moe_k": moe.moe_k,
        "moe_num_experts": moe.moe_num_experts,
        "moe_num_shared_experts": moe.moe_num_shared_experts,
        "mlp_layer_types": layer_types,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta, "mrope_section": [4, 4, 3]},
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 4}
    reference = Ernie4_5_VLMoeForConditionalGeneration(
        Ernie4_5_VLMoeConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=config.tie_word_embeddings,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            image_start_token_id=IMAGE_START,
            image_end_token_id=IMAGE_END,
            video_start_token_id=VIDEO_START,
            video_end_token_id=VIDEO_END,
        )
    )
    reference.set_attn_implementation("eager")  # plain matrix products and softmax, not the kernel that ours calls
    reference.load_state_dict(_their_state(model), strict=True)
    return reference.eval()


def _their_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    state = {"lm_head.weight": model.model.embed_tokens.weight.detach()}
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "vision_model":
            state[".".join(["model.vision_tower", *parts[1:]])] = tensor
        elif parts[0] == "resampler_model":
            parts[2] = {"0": "fc1", "2": "fc2", "3": "ln"}.get(parts[2], parts[2])
            state[".".join(["model", *parts])] = tensor
        elif parts[0] == "lm_head":
            state[name] = tensor
        else:
            state |= _their_language_tensors(".".join(["model.language_model", *parts[1:]]), tensor, model.config)
    return state


def _their_language_tensors(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Fused matrices come apart; each pool of experts becomes a block of its own."""
    if ".qkv_proj." in name:
        heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        parts = torch.split(tensor, [heads, kv_heads, kv_heads])
        return {name.replace("qkv_proj", f"{letter}_proj"): part for letter, part in zip("qkv", parts, strict=True)}
    if name.endswith(".up_gate_proj.weight"):
        gate, up = tensor.chunk(2)
        return {name.replace("up_gate_proj", "gate_proj"): gate, name.replace("up_gate_proj", "up_proj"): up}
    for ours, theirs in (
        ("mlp.vision_gate.", "mlp.vision_moe.gate."),
        ("mlp.vision_experts.", "mlp.vision_moe.experts."),
        ("mlp.gate.", "mlp.text_moe.gate."),
        ("mlp.experts.", "mlp.text_moe.experts."),
        ("experts.up_gate_proj", "experts.gate_up_proj"),
        ("gate.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias"),
    ):
        name = name.replace(ours, theirs)
    return {name: tensor[None] if name.endswith("e_score_correction_bias") else tensor}


def their_logits(reference: Any, ids: Tensor, rows: Tensor | None = None, grid_thw: Tensor | None = None) -> Tensor:
    """Their network takes images and videos apart; ours takes them in the order of the sequence."""
    if rows is None or grid_thw is None:
        return reference(input_ids=ids[None]).logits[0]
    kinds = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    arguments: dict[str, Tensor] = {}
    items = rows.split(grid_thw.prod(-1).tolist())
    for is_kind, pixels, grids in (
        (grid_thw[:, 0] == 1, "pixel_values", "image_grid_thw"),
        (grid_thw[:, 0] > 1, "pixel_values_videos", "video_grid_thw"),
    ):
        if is_kind.any():
            arguments[pixels] = torch.cat([items[i] for i in is_kind.nonzero().flatten().tolist()])
            arguments[grids] = grid_thw[is_kind]
    delimiters = torch.isin(ids, torch.tensor([IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END]))
    return reference(
        input_ids=ids[None],
        mm_token_type_ids=kinds[None],
        moe_mm_token_type_ids=(kinds + delimiters.int())[None],
        **arguments,
    ).logits[0]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return build(TIED)


@pytest.fixture(scope="module", params=[TIED, UNTIED], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest) -> tuple[VisionLanguageModel, Any]:
    ours = build(request.param)
    return ours, to_transformers(ours)


@pytest.mark.parametrize(
    "parts",
    [
        ([5, 6, 7], (1, 4, 6), [8, 9]),
        ([5], (1, 4, 4), [6, 7], (1, 2, 8), (1, 2, 2), [8, 9, 10]),
        ([5, 6], (4, 4, 6), [7]),
        ([5], (4, 4, 4), [6], (1, 6, 2), [7], (2, 2, 4), [8], (1, 2, 2), [9]),
    ],
    ids=["one image", "three images", "a video", "images and videos mixed"],
)
@torch.no_grad()
def test_logits_equal_transformers(pair: tuple[VisionLanguageModel, Any], parts: tuple[Part, ...]) -> None:
    ours, reference = pair
    ids, rows, grid_thw = prompt(*parts)
    expected = their_logits(reference, ids, rows, grid_thw)
    assert expected.std() > 0.3
    assert (ours(ids, rows, grid_thw) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_text_equals_transformers(pair: tuple[VisionLanguageModel, Any]) -> None:
    ours, reference = pair
    ids = torch.arange(20) * 7 % 89
    assert (ours(ids) - their_logits(reference, ids)).abs().max() <= TOLERANCE


@torch.no_grad()
def test_long_small_video_needs_the_option_to_equal_transformers(pair: tuple[VisionLanguageModel, Any]) -> None:
    """Six frame pairs of 1 x 2 windows: transformers lets the text behind them start at time 2, others at 6."""
    ours, reference = pair
    ids, rows, grid_thw = prompt([5, 6], (12, 2, 4), [7, 8, 9])
    expected = their_logits(reference, ids, rows, grid_thw)
    assert (ours(ids, rows, grid_thw, spatial_advance=True) - expected).abs().max() <= TOLERANCE
    delta = (ours(ids, rows, grid_thw) - expected).abs().amax(-1)
    behind = int((ids == VIDEO).nonzero().max()) + 1
    assert delta[:behind].max() <= TOLERANCE
    assert delta[behind:].min() > 100 * TOLERANCE


@torch.no_grad()
def test_videos_of_the_original_format_use_the_image_placeholder(model: VisionLanguageModel) -> None:
    parts: tuple[Part, ...] = ([5], (4, 4, 4), [6], (1, 6, 2), [7])
    native = model(*prompt(*parts))
    original = model(*prompt(*parts, video_id=IMAGE))
    assert torch.equal(native, original)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@torch.no_grad()
def test_text_equals_the_text_network_without_vision_weights(config: ModelConfig) -> None:
    assert config.moe is not None
    ours = build(config)
    text_moe = dataclasses.replace(config.moe, moe_vision_intermediate_size=0)
    text = CausalLM(dataclasses.replace(config, vision=None, moe=text_moe)).eval()
    text.load_state_dict(
        {name: t for name, t in ours.state_dict().items() if not ("vision" in name or "resampler" in name)}
    )
    ids_BT = torch.arange(24).reshape(2, 12) * 5 % 89
    assert torch.equal(ours(ids_BT), text(ids_BT))
    assert torch.equal(ours(ids_BT[0]), text(ids_BT[:1])[0])


@torch.no_grad()
def test_vision_weights_cannot_change_text() -> None:
    ours, ids = build(TIED), torch.arange(12)
    with_image = prompt([5], (1, 4, 4), [6])
    text, media = ours(ids), ours(*with_image)
    for name, tensor in [*ours.named_parameters(), *ours.named_buffers()]:
        if "mlp.vision_" in name:
            tensor.data.normal_()
    assert torch.equal(ours(ids), text)
    assert (ours(*with_image) - media).abs().max() > 0.01


@torch.no_grad()
def test_text_experts_cannot_change_the_routed_part_of_vision_tokens() -> None:
    block = build(UNTIED).model.layers[2].mlp
    assert isinstance(block, MoeBlock)
    x_TH, mask_T = torch.randn(10, 24), torch.arange(10) % 3 == 0
    before = block(x_TH, mask_T)
    for module in (block.gate, block.experts):
        randomise(module, seed=1)
    after = block(x_TH, mask_T)
    assert torch.equal(after[mask_T], before[mask_T])
    assert ((after - before)[~mask_T].abs().amax(-1) > 0).all()


@torch.no_grad()
def test_an_image_equals_a_video_of_two_equal_frames(model: VisionLanguageModel) -> None:
    ids, rows, grid_thw = prompt([5, 6], (1, 4, 6), [7, 8])
    twice = torch.cat((rows, rows))
    as_image = model(ids, rows, grid_thw)
    as_video = model(ids, twice, torch.tensor([[2, 4, 6]]))
    torch.testing.assert_close(as_image, as_video, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_order_of_images_matters(model: VisionLanguageModel) -> None:
    ids, rows, grid_thw = prompt((1, 4, 4), [5], (1, 4, 4), [6])
    swapped = torch.cat((rows[16:], rows[:16]))
    assert (model(ids, rows, grid_thw) - model(ids, swapped, grid_thw)).abs().max() > 0.01


@torch.no_grad()
def test_prefill_in_pieces_and_decode_equal_one_pass(model: VisionLanguageModel) -> None:
    """The first cut goes through the image; decoded tokens are text at the position that follows."""
    ids, rows, grid_thw = prompt([5, 6], (1, 4, 6), [7, 8])
    answer = torch.tensor([9, 10, 11])
    expected = model(torch.cat((ids, answer)), rows, grid_thw)
    features = model.encode_images(rows, grid_thw)
    positions, following = mrope_positions(ids, grid_thw, VISION)
    cache = model.new_cache()
    view = AttentionView(lengths=(5,), caches=(cache,))
    first = model.model(model.embed(ids[:5], features[:2]), positions[:5], view, model.vision_mask(ids[:5]))
    view = AttentionView(lengths=(len(ids) - 5,), caches=(cache,))
    rest = model.model(model.embed(ids[5:], features[2:]), positions[5:], view, model.vision_mask(ids[5:]))
    view = AttentionView(lengths=(1,), caches=(cache,))
    steps = [model.model(token[None], torch.tensor([following + i]), view) for i, token in enumerate(answer)]
    logits = model.logits(torch.cat([first, rest, *steps]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def _moved(model: VisionLanguageModel) -> set[str]:
    """Names of the parameters that received a gradient."""
    return {n for n, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}


def test_each_modality_trains_its_own_experts_and_both_train_what_is_shared() -> None:
    def moved_by(*arguments: Tensor) -> set[str]:
        ours = build(TIED)
        ours(*arguments).square().sum().backward()
        return _moved(ours)

    names = {name for name, _ in build(TIED).named_parameters()}
    eyes = {n for n in names if n.startswith(("vision_model.", "resampler_model."))}
    vision_pool = {n for n in names if "mlp.vision_" in n}
    text_pool = {n for n in names if ".mlp.gate." in n or ".mlp.experts." in n}
    shared = names - eyes - vision_pool - text_pool
    assert len(eyes) > 0
    assert len(vision_pool) == len(text_pool) == 3 * 3
    assert moved_by(torch.arange(30)) == shared | text_pool
    assert moved_by(*prompt((1, 8, 8))) == shared | vision_pool | eyes
    assert moved_by(*prompt(list(range(30)), (1, 8, 8))) == names


def test_placeholder_rows_take_features_in_order(model: VisionLanguageModel) -> None:
    ids = torch.tensor([5, IMAGE, 6, VIDEO, IMAGE])
    features = torch.arange(3.0)[:, None].expand(3, 24)
    embedded = model.embed(ids, features)
    table = model.model.embed_tokens.weight
    assert torch.equal(embedded[[1, 3, 4]], features)
    assert torch.equal(embedded[[0, 2]], table[[5, 6]])
    only_video = model.embed(ids, features[:1], (VIDEO,))
    assert torch.equal(only_video[3], features[0])
    assert torch.equal(only_video[[1, 4]], table[[IMAGE, IMAGE]])


def test_vision_mask_holds_placeholders_and_delimiters(model: VisionLanguageModel) -> None:
    ids = torch.tensor([5, IMAGE_START, IMAGE, IMAGE_END, 89, VIDEO_START, VIDEO, VIDEO_END, 96])
    assert model.vision_mask(ids).tolist() == [False, True, True, True, False, True, True, True, False]


def test_delimiters_alone_are_routed_to_vision_experts() -> None:
    ours, ids = build(TIED), torch.tensor([5, IMAGE_START, 6])
    ours(ids).square().sum().backward()
    assert any("vision_experts" in name for name in _moved(ours))


def test_initialize_fills_every_parameter_and_bias() -> None:
    ours = VisionLanguageModel(UNTIED)
    for tensor in [*ours.parameters(), *ours.buffers()]:
        tensor.data.fill_(float("nan"))
    initialize(ours, std=0.02, correction_bias_std=0.1)
    for name, tensor in [*ours.named_parameters(), *ours.named_buffers()]:
        assert tensor.isfinite().all(), name
    assert ours(*prompt([5], (1, 4, 4), [6])).isfinite().all()


@pytest.mark.parametrize(("name", "expected"), [("VL-28B-A3B", 29_399_294_336), ("VL-424B-A47B", 423_526_285_184)])
def test_parameter_counts_of_the_published_models(name: str, expected: int) -> None:
    config = preset(name)
    with torch.device("meta"):
        ours = VisionLanguageModel(config, torch.bfloat16)
    biases = [(n, buffer) for n, buffer in ours.named_buffers() if n.endswith("e_score_correction_bias")]
    assert len(biases) == 2 * config.num_moe_layers == len(list(ours.buffers()))
    total = sum(p.numel() for p in ours.parameters()) + sum(bias.numel() for _, bias in biases)
    assert total == count_parameters(config).total == expected


@pytest.mark.parametrize(
    ("count", "width", "message"),
    [
        (5, 24, r"\(5, 24\), expected \(6, 24\): 6 of 10 tokens"),
        (7, 24, r"\(7, 24\), expected \(6, 24\)"),
        (6, 23, r"\(6, 23\), expected \(6, 24\)"),
        (0, 24, r"\(0, 24\), expected \(6, 24\)"),
    ],
)
def test_features_that_do_not_fit(model: VisionLanguageModel, count: int, width: int, message: str) -> None:
    ids, _, _ = prompt([5], (1, 4, 6), [6])
    with pytest.raises(ShapeError, match=message):
        model.embed(ids, torch.zeros(count, width) if count else None)


def test_input_that_does_not_fit(model: VisionLanguageModel) -> None:
    ids, rows, grid_thw = prompt([5], (1, 4, 6), [6, 7])
    with pytest.raises(ShapeError, match=r"\(24, 47\).*\(24, 48\)"):
        model(ids, rows[:, 1:], grid_thw)
    with pytest.raises(ShapeError, match=r"\(20, 48\).*\(24, 48\)"):
        model(ids, rows[:20], grid_thw)
    with pytest.raises(ShapeError, match="1 x 3 x 8"):
        model(ids, rows, torch.tensor([[1, 3, 8]]))
    with pytest.raises(ShapeError, match=r"6 placeholder tokens .* need 4"):
        model(ids, rows, torch.tensor([[1, 4, 4]]))
    with pytest.raises(ShapeError, match="grid_thw is missing"):
        model(ids, rows)
    with pytest.raises(ShapeError, match="rows is missing"):
        model(ids, grid_thw=grid_thw)
    with pytest.raises(ShapeError, match=r"expected \(6, 24\)"):
        model(ids)
    with pytest.raises(ShapeError, match="one sequence"):
        model(ids[None], rows, grid_thw)
    with pytest.raises(ShapeError, match="float32"):
        model(ids.float())
    with pytest.raises(ShapeError, match=r"\(0,\)"):
        model(ids[:0])


def test_a_text_config_is_refused() -> None:
    with pytest.raises(ConfigError, match="vision part"):
        VisionLanguageModel(preset("0.3B"))
