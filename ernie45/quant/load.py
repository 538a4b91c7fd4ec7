"""Load a packed folder: the network is built without memory, its leaves are mapped, only small tensors are read."""

from __future__ import annotations

import torch

from ernie45.checkpoint.load import Progress
from ernie45.errors import ConfigError
from ernie45.layers.native import use_kernel_leaves
from ernie45.models.build import build_model
from ernie45.models.text import CausalLM
from ernie45.quant.folder import PackedSource
from ernie45.quant.layers import swap_leaves


@torch.no_grad()
def load_packed(
    source: PackedSource, dtype: str | torch.dtype, device: str | torch.device, progress: Progress | None = None
) -> CausalLM:
    """The network of a packed folder, in evaluation mode; see `ernie45.checkpoint.load.load_model`.

    Raises: ConfigError for a dtype other than float32 or `auto`, or a device other than the CPU.
    """
    if dtype not in ("auto", "float32", torch.float32):
        raise ConfigError(
            f"{source.where}: dtype {dtype} was asked for, but packed weights compute in float32: use float32 or auto"
        )
    if torch.device(device).type != "cpu":
        raise ConfigError(f"{source.where}: packed weights run on the CPU, not on {device}: convert it (--to pt) first")
    model = build_model(source.config, dtype=torch.float32, device="meta")
    swap_leaves(model, {parameter.name: source.matrices(parameter) for parameter in source.plan.packed})
    model.to_empty(device="cpu")
    tensors = model.state_dict()
    assert tensors.keys() == source.plan.plain.keys(), f"{tensors.keys() ^ source.plan.plain.keys()} are not filled"
    for stored in source.layout:
        if stored.name in tensors:
            tensors[stored.name].copy_(source.read(stored))
    if progress is not None:
        progress(source.index.total_bytes, source.index.total_bytes)
    model.load_account = source.account
    use_kernel_leaves(model)
    model.kv_dtype = torch.bfloat16
    model.mapped_bytes = source.index.total_bytes
    return model.requires_grad_(False).eval()
