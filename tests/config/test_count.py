"""Counting from the configuration against counting the modules."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

import ernie45
from ernie45.config.model import ModelConfig, MoeConfig
from ernie45.models.build import build_model


@given(
    bias=st.booleans(), tied=st.booleans(), mtp=st.integers(0, 2), shared=st.integers(0, 2), start=st.integers(0, 2),
    experts=st.sampled_from([0, 3]), aux_free=st.booleans(), heads=st.sampled_from([(4, 2), (3, 3)]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_counts_equal_the_modules(
    bias: bool, tied: bool, mtp: int, shared: int, start: int, experts: int, aux_free: bool, heads: tuple[int, int]
) -> None:
    moe = None
    if experts:
        moe = MoeConfig(
            moe_num_experts=experts, moe_k=2, moe_intermediate_size=10, moe_num_shared_experts=shared,
            moe_layer_start_index=start, moe_use_aux_free=aux_free,
        )  # fmt: skip
    config = ModelConfig(
        vocab_size=30, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], head_dim=8, use_bias=bias, tie_word_embeddings=tied,
        num_nextn_predict_layers=mtp, moe=moe,
    )  # fmt: skip
    model = build_model(config, device="meta")
    counted = ernie45.count_parameters(config)
    assert counted.total_with_mtp == sum(t.numel() for t in model.state_dict().values())
    of_mtp = sum(t.numel() for name, t in model.state_dict().items() if ".mtp_" in name)
    assert counted.mtp == of_mtp
    idle = (experts - 2) * 3 * 24 * 10 * config.num_moe_layers if moe else 0
    embedding = 0 if tied else 30 * 24
    assert counted.active == counted.total - idle - embedding
