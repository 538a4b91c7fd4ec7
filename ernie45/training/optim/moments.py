"""What a running average is kept in: float32, bfloat16, or 8 bits with a scale per block of 256.

Averages move by a few per mille per step. Rounded to the nearest narrow number such a step is lost, always, and the average stands
still. So the narrow forms round at random, up or down with the odds that make the mean right. The random numbers follow from the
parameter's name and the step, so a run that goes on gives the same bits.

The 8-bit form is x = scale * (q / N)^e with the block's largest magnitude as scale: e = 2 and N = 127 with sign for the first moment,
e = 4 and N = 255 for the second, which is never negative. Powers put levels where the small values are. Error of one rounding:
below the distance of the two levels around x, which is at most e / N of the scale (1.6 % in both forms) and, from level 8 of the
first and level 16 of the second moment on, at most 28 % of x. The mean error is 0. A second moment that is not zero never becomes
zero, because steps are divided by its root: its lowest level is 1, 2.4e-10 of the scale.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ernie45.training.optim.config import StateDtype

BLOCK = 256
"""Values that share a scale."""


class Store(Protocol):
    """A tensor that is worked on in float32, by flat ranges that begin at multiples of `BLOCK`."""

    def read(self, start: int, stop: int) -> Tensor:
        """Values of a range, float32 (stop - start,). Work on them in place, then write them back."""

    def write(self, start: int, values: Tensor, random: Generator) -> None:
        """Keep what was read and changed."""

    def tensors(self) -> dict[str, Tensor]:
        """What it is kept in, by suffix of the name in a checkpoint."""


class WideStore:
    """float32: reading gives a view, so that there is nothing to write back."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store`."""
        return _flat(self.tensor)[start:stop]

    def write(self, start: int, values: Tensor, random: Generator) -> None:
        """See `Store`."""

    def tensors(self) -> dict[str, Tensor]:
        """See `Store`."""
        return {"": self.tensor}


class BFloat16Store:
    """bfloat16, rounded at random."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store`."""
        return _flat(self.tensor)[start:stop].float()

    def write(self, start: int, values: Tensor, random: Generator) -> None:
        """See `Store`."""
        _flat(self.tensor)[start : start + len(values)].copy_(round_to_bfloat16(values, random))

    def tensors(self) -> dict[str, Tensor]:
        """See `Store`."""
        return {"": self.tensor}


class Int8Store:
    """8 bits per value and a float32 scale per block."""

    def __init__(self, like: Tensor, *, signed: bool) -> None:
        self.signed = signed
        self.levels = 127 if signed else 255
        dtype = torch.int8 if signed else torch.uint8
        self.codes = torch.zeros(like.shape, dtype=dtype, device=like.device)
        self.scales = torch.zeros(-(-like.numel() // BLOCK), dtype=torch.float32, device=like.device)

    def read(self, start: int, stop: int) -> Tensor:
        """See `Store`."""
        codes = _flat(self.codes)[start:stop].float().div_(self.levels)
        values = codes * codes.abs() if self.signed else codes.square_().square_()
        return values.mul_(self._per_value(start, stop))

    def write(self, start: int, values: Tensor, random: Generator) -> None:
        """See `Store`."""
        stop = start + len(values)
        blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        self.scales[start // BLOCK : -(-stop // BLOCK)] = blocks.abs().amax(1)
        scale = self._per_value(start, stop)
        position = values.abs().div_(scale.clamp_min(torch.finfo(torch.float32).tiny)).clamp_(max=1)
        levels = self._level_at_random(position, random)
        if self.signed:
            levels.mul_(values.sign())
        else:
            levels.clamp_(min=1)  # of a block of zeros the scale is 0
        _flat(self.codes)[start:stop] = levels.to(self.codes.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """See `Store`."""
        return {"": self.codes, "_scale": self.scales}

    def _per_value(self, start: int, stop: int) -> Tensor:
        return self.scales[start // BLOCK : -(-stop // BLOCK)].repeat_interleave(BLOCK)[: stop - start]

    def _level_at_random(self, position: Tensor, random: Generator) -> Tensor:
        """One of the two levels around each of `position` in [0, 1], the upper one with the odds that make the mean right."""
        low = self._root(position).mul_(self.levels).floor_().clamp_(max=self.levels - 1)
        below, above = self._value(low / self.levels), self._value((low + 1) / self.levels)
        distance = above.sub_(below).mul_(torch.rand(position.shape, generator=random, device=position.device))
        return low.add_(below.add_(distance) < position)

    def _root(self, values: Tensor) -> Tensor:
        return values.sqrt() if self.signed else values.sqrt().sqrt_()

    def _value(self, shares: Tensor) -> Tensor:
        return shares.square_() if self.signed else shares.square_().square_()


def new_store(like: Tensor, dtype: StateDtype, *, signed: bool) -> Store:
    """A store of zeros in the shape of `like`. `signed`: whether values may be negative."""
    if dtype == "int8":
        return Int8Store(like, signed=signed)
    zeros = torch.zeros(like.shape, dtype=getattr(torch, dtype), device=like.device)
    return WideStore(zeros) if dtype == "float32" else BFloat16Store(zeros)


def round_to_bfloat16(values: Tensor, random: Generator) -> Tensor:
    """Round finite float32 numbers to one of the two neighbours in bfloat16, at random and right in the mean.

    bfloat16 is the upper half of a float32: adding a random lower half carries into the upper one as often as it should.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=random, dtype=torch.int32, device=bits.device)
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def random_of(name: str, step: int, device: torch.device) -> Generator:
    """The random numbers of one parameter in one step: the same in every run."""
    return Generator(device).manual_seed(zlib.crc32(f"{name} {step}".encode()))


def _flat(tensor: Tensor) -> Tensor:
    """Taken anew each time, because loading a checkpoint may give a parameter other memory."""
    return tensor.detach().view(-1)
