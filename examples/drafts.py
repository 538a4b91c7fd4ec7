"""Build a small MoE with a multi-token prediction block and look two tokens ahead. Run: python examples/drafts.py

The weights are random, so the guesses are worth nothing; the point is how the block is called.
"""

import torch

import ernie45
from ernie45.layers.cache import AttentionView
from ernie45.models.build import build_model
from ernie45.models.init import initialize


def main() -> None:
    """One pass of the main network, one of the block, two tokens."""
    config = ernie45.ModelConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_nextn_predict_layers=1,
        moe=ernie45.MoeConfig(moe_num_experts=16, moe_k=4, moe_intermediate_size=64, moe_num_shared_experts=1),
    )
    model = build_model(config).eval()
    initialize(model, std=0.05, seed=1, correction_bias_std=0.02)
    print(ernie45.count_parameters(config))
    ids = torch.tensor([5, 17, 23, 99])
    view = AttentionView(lengths=(len(ids),))
    with torch.no_grad():
        hidden = model.hidden(ids, view)
        following = model.logits(hidden[-1:]).argmax(-1)
        shifted = torch.cat((ids[1:], following))
        ahead = model.model.mtp(hidden, shifted, torch.arange(len(ids)), view)
        guess = model.mtp_logits(ahead[-1:]).argmax(-1)
    print(f"after {ids.tolist()} comes {following.item()}, and then, by the block's guess, {guess.item()}")


if __name__ == "__main__":
    main()
