"""Muon: the momentum of a convolution, made orthogonal as a matrix (https://kellerjordan.github.io/posts/muon/)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from resnet_in1k.utils.device import fastest_precision

# One polynomial a x + b x³ + c x⁵ for each iteration; together they bring singular values near 1
# (https://leloykun.github.io/ponder/muon-opt-coeffs).
COEFFICIENTS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SMALLEST_NORM = 1e-7
WIDE = 1.5
"""Columns per row from which the iteration on rows × rows takes fewer multiplications than that on the matrix."""
FALLBACK_BETAS, FALLBACK_EPS = (0.9, 0.95), 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for groups with `is_matrix`; AdamW, or NAdamW with Nesterov's momentum, for the others.

    A weight of shape (out, in, kh, kw) is a matrix of out rows. Updates have the size of AdamW's, so lr and
    weight_decay have its order (https://arxiv.org/abs/2502.16982). The other groups learn at lr × `fallback_lr_factor`.
    Nothing in a step makes the host wait for the device.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        nesterov: bool,
        weight_decay: float,
        fallback_lr_factor: float = 1.0,
    ):
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(groups, defaults | {"fallback_lr_factor": fallback_lr_factor})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                update = self._orthogonal_step if group["is_matrix"] else self._adamw_step
                update(group, parameters, [parameter.grad for parameter in parameters])

    def _orthogonal_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        momenta = [self._state(parameter, "momentum_buffer") for parameter in parameters]
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        places_of_shape = defaultdict(list)
        for place, update in enumerate(updates):
            places_of_shape[update.flatten(1).shape].append(place)
        for (rows, columns), places in places_of_shape.items():
            matrices = torch.stack([updates[place].flatten(1) for place in places])
            scale = -group["lr"] * 0.2 * max(rows, columns) ** 0.5
            orthogonal = orthogonalize(matrices).mul_(scale)
            changes = [change.view(parameters[places[0]].shape) for change in orthogonal]
            torch._foreach_add_([parameters[place] for place in places], changes)

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        means = [self._state(parameter, "exp_avg") for parameter in parameters]
        squares = [self._state(parameter, "exp_avg_sq") for parameter in parameters]
        lr, (beta1, beta2) = group["lr"] * group["fallback_lr_factor"], FALLBACK_BETAS
        steps = []
        for parameter in parameters:  # frozen parameters begin later
            self.state[parameter]["step"] = self.state[parameter].get("step", 0) + 1
            steps.append(self.state[parameter]["step"])
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_div_(divisors, [(1 - beta2**step) ** 0.5 for step in steps])
        torch._foreach_add_(divisors, FALLBACK_EPS)
        directions = torch._foreach_lerp(means, gradients, 1 - beta1) if group["nesterov"] else means
        torch._foreach_addcdiv_(parameters, directions, divisors, [-lr / (1 - beta1**step) for step in steps])

    def _state(self, parameter: Tensor, name: str) -> Tensor:
        if name not in self.state[parameter]:
            self.state[parameter][name] = torch.zeros_like(parameter)
        return self.state[parameter][name]


def orthogonalize(matrices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return nearly U Vᵀ of matrices U S Vᵀ, (N, rows, columns) float32.

    It is computed in bfloat16 on a device that is fast at it, else in float32, unless `dtype` is given.
    """
    if dtype is None:
        dtype = torch.bfloat16 if fastest_precision(matrices.device.type) == "bf16" else torch.float32
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = (matrices.mT if is_tall else matrices).to(dtype)
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp_(min=SMALLEST_NORM)
    _, rows, columns = found.shape
    # In bfloat16 the products of rows × rows are too coarse to iterate on.
    found = _by_gram_matrix(found) if dtype == torch.float32 and columns > WIDE * rows else _by_iteration(found)
    return (found.mT if is_tall else found).float()


def _by_iteration(found: Tensor) -> Tensor:
    for a, b, c in COEFFICIENTS:
        gram = found @ found.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        found = torch.baddbmm(found, factor, found, beta=a)
    return found


def _by_gram_matrix(found: Tensor) -> Tensor:
    """Iterate on X Xᵀ alone, and multiply X once at the end: all factors are polynomials of X Xᵀ, so they commute."""
    gram, product = found @ found.mT, None
    for number, (a, b, c) in enumerate(COEFFICIENTS, 1):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if number < len(COEFFICIENTS):
            gram = factor @ gram @ factor
    return product @ found
