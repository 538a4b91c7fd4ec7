"""Blocks that the networks share: rotary embedding, norm, attention, feed-forward, router and experts."""
