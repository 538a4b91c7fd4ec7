"""Losses as pure functions of tensors. No loss knows a network, a file or a loop; means and shares are taken where said."""
