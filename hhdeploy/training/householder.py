"""The training-time model: dense Householder matrices as parametrizations of timm's weights.

Written as the paper's equations read, with dense H_u, D and H_v and torch's autograd, and
independent of `hhdeploy.algebra`: parity compares two implementations that share no code.
Parametrizing the weight, not the module, also reaches models that call ``F.linear`` on
``qkv.weight`` directly (BEiT, EVA-02, Swin-v2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hhdeploy.algebra import Reflection
from hhdeploy.backbones.sites import Form

_INIT_STD = 0.02


def reflection_matrix(x: Tensor, reflection: Reflection) -> Tensor:
    """Dense H: I - x xᵀ (``unnormalized``, Eq. 3) or I - 2 x xᵀ / ‖x‖² (``orthogonal``)."""
    identity = torch.eye(x.numel(), dtype=x.dtype, device=x.device)
    outer = torch.outer(x, x)
    if reflection == "unnormalized":
        return identity - outer
    squared_norm = torch.dot(x, x)
    if squared_norm == 0:
        return identity
    return identity - 2.0 * outer / squared_norm


class HouseholderMatrix(nn.Module):
    """The trained (out, in) matrix H_u D H_v + lora_B lora_A of one site.

    Parameters (any of the two groups may be absent, as in the adapter file): ``u`` (out,),
    ``v`` (in,), ``d`` (min(out, in),); ``lora_A`` (r, in), ``lora_B`` (out, r).
    """

    def __init__(self, tensors: Mapping[str, Tensor], reflection: Reflection) -> None:
        super().__init__()
        self.reflection: Reflection = reflection

        def parameter(name: str) -> nn.Parameter | None:
            return nn.Parameter(tensors[name].clone()) if name in tensors else None

        self.u, self.v, self.d = parameter("u"), parameter("v"), parameter("d")
        self.lora_A, self.lora_B = parameter("lora_A"), parameter("lora_B")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        if self.u is not None and self.v is not None:
            return self.u.numel(), self.v.numel()
        assert self.lora_A is not None
        assert self.lora_B is not None
        return self.lora_B.shape[0], self.lora_A.shape[1]

    def forward(self) -> Tensor:
        """The dense matrix."""
        matrix: Tensor | None = None
        if self.u is not None and self.v is not None and self.d is not None:
            diagonal = self.d.new_zeros(self.u.numel(), self.v.numel())
            diagonal = torch.diagonal_scatter(diagonal, self.d)
            matrix = (
                reflection_matrix(self.u, self.reflection)
                @ diagonal
                @ reflection_matrix(self.v, self.reflection)
            )
        if self.lora_A is not None and self.lora_B is not None:
            low_rank = self.lora_B @ self.lora_A
            matrix = low_rank if matrix is None else matrix + low_rank
        assert matrix is not None, "a site has at least one group of tensors"
        return matrix

    def tensors(self) -> dict[str, Tensor]:
        """The parameters that are present, detached, by their name in the adapter file."""
        return {name: value.detach() for name, value in self.named_parameters(recurse=False)}


def new_site(
    out: int, in_: int, r: int, form: Form, reflection: Reflection, generator: torch.Generator
) -> HouseholderMatrix:
    """An untrained site.

    Additive: d = 0 and lora_B = 0, so the model starts as the backbone. Sequential: d = 1 and
    lora_B = 0. u and v are small and random, never zero: at zero the gradient of I - x xᵀ
    vanishes and they would stay there. For the orthogonal sequential form v starts equal to u,
    which makes H_u H_v the identity.
    """

    def normal(*shape: int, std: float = _INIT_STD) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    u, v = normal(out), normal(in_)
    if form == "sequential" and reflection == "orthogonal":
        v = u.clone()
    n = min(out, in_)
    tensors = {"u": u, "v": v, "d": torch.ones(n) if form == "sequential" else torch.zeros(n)}
    if r > 0:
        tensors["lora_A"] = normal(r, in_, std=in_**-0.5)
        tensors["lora_B"] = torch.zeros(out, r)
    return HouseholderMatrix(tensors, reflection)


class AdditiveDelta(nn.Module):
    """Parametrization W -> W + delta_W (Eq. 6); for a fused qkv on the rows of q, k and v."""

    def __init__(self, sites: Mapping[str, tuple[int, HouseholderMatrix]]) -> None:
        """``sites``: site name -> (first row of the weight, matrix)."""
        super().__init__()
        self.names = list(sites)
        self.starts = [start for start, _ in sites.values()]
        self.matrices = nn.ModuleList(matrix for _, matrix in sites.values())

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Site -> its trained tensors, detached, as the adapter file names them."""
        for name, matrix in zip(self.names, self.matrices, strict=True):
            assert isinstance(matrix, HouseholderMatrix)
            yield name, matrix.tensors()

    def forward(self, weight: Tensor) -> Tensor:
        """weight (out, in) -> the adapted weight."""
        rows: list[Tensor] = []
        position = 0
        for start, matrix in zip(self.starts, self.matrices, strict=True):
            delta = matrix()
            rows += [weight[position:start], weight[start : start + delta.shape[0]] + delta]
            position = start + delta.shape[0]
        return torch.cat([*rows, weight[position:]])


class Scaling(nn.Module):
    """Parametrization W -> diag(s_out) W diag(s_in) on one site's rows of the weight.

    It comes first: ΔW is added to the scaled weight, and M multiplies it.
    """

    def __init__(self, name: str, rows: slice, s_in: Tensor | None, s_out: Tensor | None) -> None:
        """``rows``: the site's, all of them but for a fused qkv; s_in (in,), s_out (rows,)."""
        super().__init__()
        self.name, self.rows = name, rows
        self.s_in = None if s_in is None else nn.Parameter(s_in.clone())
        self.s_out = None if s_out is None else nn.Parameter(s_out.clone())

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Site -> its s_in and s_out, detached."""
        yield self.name, {key: value.detach() for key, value in self.named_parameters()}

    def forward(self, weight: Tensor) -> Tensor:
        """weight (out, in) -> the scaled weight."""
        part = weight[self.rows]
        if self.s_out is not None:
            part = part * self.s_out.unsqueeze(1)
        if self.s_in is not None:
            part = part * self.s_in.unsqueeze(0)
        return torch.cat([weight[: self.rows.start], part, weight[self.rows.stop :]])


class BiasShift(nn.Module):
    """Parametrization b -> b + db on one site's elements of the bias."""

    def __init__(self, name: str, rows: slice, db: Tensor) -> None:
        """``rows``: the site's, all of them but for a fused qkv; db (rows,)."""
        super().__init__()
        self.name, self.rows = name, rows
        self.db = nn.Parameter(db.clone())

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Site -> its db, detached."""
        yield self.name, {"db": self.db.detach()}

    def forward(self, bias: Tensor) -> Tensor:
        """bias (out,) -> the shifted bias."""
        part = bias[self.rows] + self.db
        return torch.cat([bias[: self.rows.start], part, bias[self.rows.stop :]])


class SequentialTransform(nn.Module):
    """Parametrization W -> M W (Eq. 7); `SharedTransform` does the same to the bias."""

    def __init__(self, name: str, matrix: HouseholderMatrix) -> None:
        super().__init__()
        self.name, self.matrix = name, matrix

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Site -> its trained tensors, detached, as the adapter file names them."""
        yield self.name, self.matrix.tensors()

    def forward(self, tensor: Tensor) -> Tensor:
        """Weight (out, in) -> the transformed weight."""
        return torch.as_tensor(self.matrix() @ tensor)


class SharedTransform(nn.Module):
    """Parametrization b -> M b (Eq. 7) with the matrix of the weight's `SequentialTransform`.

    It holds the matrix without owning it, so that the model's state dict has every tensor once.
    """

    def __init__(self, matrix: HouseholderMatrix) -> None:
        super().__init__()
        self._shared = (matrix,)  # nn.Module takes no notice of a tuple

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Nothing: they are the weight's."""
        return iter(())

    def forward(self, bias: Tensor) -> Tensor:
        """bias (out,) -> the transformed bias."""
        (matrix,) = self._shared
        # A replica of DataParallel has the matrix of the model that it was made of.
        return torch.as_tensor(matrix().to(bias.device) @ bias)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing; older state dicts had the matrix here too."""


class Between(nn.Module):
    """An adapter at another strength: the frozen tensor plus a share of what was added to it."""

    def __init__(self, frozen: Tensor, strength: float) -> None:
        super().__init__()
        self.frozen: Tensor
        self.register_buffer("frozen", frozen)
        self.strength = strength

    def site_tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Nothing: the strength is no part of the adapter's files."""
        return iter(())

    def forward(self, adapted: Tensor) -> Tensor:
        """frozen + strength (adapted - frozen)."""
        return self.frozen + self.strength * (adapted - self.frozen)
