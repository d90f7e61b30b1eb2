"""What is said where the gradient of a gradient is asked of an op that has none."""

from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from holdfast.ops.native import is_transformed

__all__ = ["differentiable_once", "refuse_in"]


def refuse_in(op: str, backend: str, *backwards: CustomOpDef) -> None:
    """Give operators that compute first derivatives a gradient of their own, which says that there is none.

    Args:
        op, backend: whose they are, as a user calls them.
        backwards: operators without a registered gradient.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError(_message(op, backend))

    for backward in backwards:
        backward.register_autograd(refuse)


def differentiable_once(op: str, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs of a function of PyTorch that has no second derivative, as views which say so.

    The same tensors where no gradient is wanted, and under transformations and compilers, which have words of their
    own. First derivatives are as they were, with `create_graph` too.
    """
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _Once.apply(_message(op, backend), *tensors) if wanted and not is_transformed() else tensors


def _message(op: str, backend: str) -> str:
    return f"{op} has no second derivative with backend {backend!r}: take backend 'reference', which is slow."


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.message = message
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            grads = tuple(None if grad is None else _Refusing.apply(grad, ctx.message) for grad in grads)
        return None, *grads


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, message: str) -> Tensor:
        ctx.message = message
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(ctx.message)
