"""A GPU for machines without one: a device whose tensors hold CPU tensors, on which its operators run.

So what is computed there is what the CPU computes, to the last bit, where every tensor is in its place; and a tensor
out of place is an error as on a real GPU. With `rounding` results are a little off, as those of other kernels are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
INDEXED = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
# what adds up in an order of its own, or has other approximations
ROUNDED = (
    {getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")}
    | {getattr(torch.ops.aten, name) for name in ("sum", "mean", "var", "std", "div", "exp", "expm1", "log", "sqrt")}
    | {getattr(torch.ops.aten, name) for name in ("sigmoid", "tanh", "softplus", "silu", "_softmax", "logsumexp")}
    | {getattr(torch.ops.aten, name) for name in ("_cdist_forward", "linalg_cholesky_ex", "_linalg_eigh")}
)


class Misplaced(RuntimeError):
    """An operator was given tensors that no GPU would take together."""


class Pretended(Tensor):
    """A tensor that says that it is on the GPU; `held` has its numbers, and shares memory where this one would."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor):
        self.held = held

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees every operator, also those that make a first tensor there."""

    def __init__(self, rounding: float):
        super().__init__()
        self.rounding, self.generator = rounding, torch.Generator().manual_seed(0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = run(function, args, kwargs or {})
        if self.rounding and function.overloadpacket in ROUNDED:
            tree_map(self.round, found)
        return found

    def round(self, value: Any) -> None:
        if isinstance(value, Pretended) and value.is_floating_point():
            off = torch.rand(value.shape, generator=self.generator, dtype=value.dtype).mul_(2).sub_(1)
            value.held.mul_(off.mul_(self.rounding * torch.finfo(value.dtype).eps).add_(1))


def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator, on what the tensors hold. Raises Misplaced."""
    given: dict[
        int, Tensor
    ] = {}  # by the identity of what they hold: operators in place give back what they were given
    there, here = [], []

    def hold(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        held = value.held if isinstance(value, Pretended) else value
        (there if isinstance(value, Pretended) else here).append(value)
        given[id(held)] = value
        return held

    held_args, held_kwargs = tree_map(hold, args), tree_map(hold, kwargs)
    asked = kwargs.get("device")
    if asked is not None and asked.type == NAME:
        held_kwargs["device"] = torch.device("cpu")
    goes_there = asked.type == NAME if asked is not None else bool(there)
    if goes_there and torch.Tag.nondeterministic_seeded in function.tags:
        raise Misplaced(f"{function} would draw on the GPU")
    if there and here:
        require_allowed(function, args, here)
    found = function(*held_args, **held_kwargs)

    def give(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else Pretended(value) if goes_there else value

    return tree_map(give, found)


def require_allowed(function: Any, args: tuple[Any, ...], here: list[Tensor]) -> None:
    """Raises Misplaced unless CUDA lets this operator have tensors of the CPU beside those of the GPU.

    It does so in copies, for indices, and for single numbers where an operator goes number by number.
    """
    packet = function.overloadpacket
    if packet == torch.ops.aten.copy_:
        return
    in_place = function._schema.is_mutable and not isinstance(args[0], Pretended)
    numbers = torch.Tag.pointwise in function.tags and not in_place
    if packet in INDEXED:
        here, numbers = [tensor for tensor in here if not any(tensor is index for index in args[1])], True
        if not isinstance(args[0], Pretended):
            raise Misplaced(f"{function} takes numbers on the CPU by indices on the GPU")
    if any(tensor.dim() or not numbers for tensor in here):
        raise Misplaced(f"{function} was given tensors on the CPU and on the GPU")


@cache
def register() -> None:
    _setup_privateuseone_for_python_backend(NAME)


@contextmanager
def pretended_gpu(rounding: float = 0) -> Iterator[torch.device]:
    """The device, as long as this is open. Results are off by `rounding` units in the last place at most."""
    register()
    lifting, overwriting = (
        torch._C._only_lift_cpu_tensors(),
        torch.__future__.get_overwrite_module_params_on_conversion(),
    )
    torch._C._set_only_lift_cpu_tensors(
        True
    )  # torch.tensor(..., device=) then moves what it has made where Mode sees it
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # what is set as `.data` keeps what it held
    try:
        # another thread would flush no denormal numbers
        with torch.autograd.set_multithreading_enabled(False), Mode(rounding):
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(lifting)
        torch.__future__.set_overwrite_module_params_on_conversion(overwriting)
