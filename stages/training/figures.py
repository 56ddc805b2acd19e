"""Figures of a player's turn: how each is added up over micro-batches and processes, so that it is that of the whole batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """A mean over some of a micro-batch's samples, of which there may be none. Logged as `<name>`; a step without such samples has no figure."""

    total: Tensor
    """Sum over those samples, a scalar."""
    count: Tensor
    """How many they are, a scalar."""


@dataclass(frozen=True, eq=False)
class Spread:
    """All values of a micro-batch's tensor. Logged as `<name>_mean` and `<name>_std`, the deviation from the mean of the whole batch."""

    mean: Tensor
    square: Tensor
    """Mean of the squares."""

    @classmethod
    def of(cls, values: Tensor) -> "Spread":
        """The spread of all values of a tensor, without gradient."""
        wide = values.detach().float()
        return cls(wide.mean(), wide.square().mean())


Figure = Tensor | Share | Spread
"""What a method's loss may return by name: a tensor is a scalar, a mean over the micro-batch's samples."""

_MARK = ":"  # no name of a figure has one


def scalars(named: Mapping[str, Figure]) -> dict[str, Tensor]:
    """Scalars whose mean over equal micro-batches and processes says all about the whole batch; `to_host` reads that mean."""
    found: dict[str, Tensor] = {}
    for name, figure in named.items():
        if isinstance(figure, Tensor):
            found[name] = figure
        else:
            found |= {f"{name}{_MARK}{part}": value for part, value in vars(figure).items()}
    return found


def shares_by_value(name: str, values: Tensor, known: Mapping[int, str], true: Tensor) -> dict[str, Share]:
    """Share of `true` (B,) among the samples of each of the `known` values of `values` (B,) long: figures `<name>_at_<label>`."""
    member = values == torch.tensor(list(known), device=values.device)[:, None]  # (values, B)
    totals, counts = (member & true).sum(1).float(), member.sum(1).float()
    return {f"{name}_at_{label}": Share(*pair) for label, pair in zip(known.values(), zip(totals, counts, strict=True), strict=True)}


def add_mean(total: Mapping[str, Tensor], named: Mapping[str, Figure], count: int) -> dict[str, Tensor]:
    """Add one of `count` micro-batches' figures to the mean of their scalars, on their device."""
    return {name: value.detach().float() / count + total.get(name, 0.0) for name, value in scalars(named).items()}


def to_host(averaged: Mapping[str, Tensor]) -> dict[str, float]:
    """Bring the averaged scalars to the host, the one point in a turn at which it waits for the device, and read the figures from them."""
    values = dict(zip(averaged, torch.stack(list(averaged.values())).tolist(), strict=True))
    found: dict[str, float] = {}
    for key, value in values.items():
        name, _, part = key.partition(_MARK)
        if not part:
            found[name] = value
        elif part == "count" and value:
            found[name] = values[f"{name}{_MARK}total"] / value
        elif part == "square":
            mean = values[f"{name}{_MARK}mean"]
            found |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(value - mean * mean, 0.0))}
    return found
