"""A second device made of host memory: what mixes it up with the CPU fails, as on an accelerator.

A build of torch for the CPU cannot trace for CUDA, and fake tensors have no values, while batching
and sampling read lengths and tokens back. Here tensors keep their values, name another device than
the CPU ("meta", the one foreign device every build knows), and an operation between the two raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
_MOVES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
# On an accelerator an index may lie on the CPU: torch moves it.
_INDEXING = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
    torch.ops.aten._index_put_impl_.default,
)


class MixedDevicesError(RuntimeError):
    """An operation took tensors of two devices."""


class _Distant(Tensor):
    """A tensor that names the other device and keeps its values on the host."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _Distant:
        made: _Distant = Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=ELSEWHERE,
        )
        made.values = values
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"_Distant({self.values!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    """Also sees operations without a tensor argument, such as arange."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Python(TorchFunctionMode):
    """Where torch itself treats "meta" as a device without values, before any operation runs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.data_ptr and isinstance(args[0], _Distant):
            return args[0].values.data_ptr()
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(
                torch.tensor(part, dtype=torch.long) if isinstance(part, list) else part
                for part in parts
            )
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Inside, the returned device holds real values and refuses to be mixed with the CPU."""
    with _Dispatch(), _Python():
        yield ELSEWHERE


def move_there(module: nn.Module) -> None:
    """Replace parameters and buffers by distant ones; ties between them stay."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in moved:
                    values = parameter.detach().clone()
                    moved[id(parameter)] = nn.Parameter(
                        _Distant(values), requires_grad=parameter.requires_grad
                    )
                part._parameters[name] = moved[id(parameter)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = _Distant(buffer.detach().clone())


def values_of(tensor: Tensor) -> Tensor:
    """What a distant tensor holds."""
    assert isinstance(tensor, _Distant), "the tensor is on the CPU"
    return tensor.values


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, _ = tree_flatten((args, kwargs))
    distant = [value for value in flat if isinstance(value, _Distant)]
    near = [v for v in flat if isinstance(v, Tensor) and not isinstance(v, _Distant)]
    assert all(value.device != ELSEWHERE for value in near), f"{func} got a tensor without values"
    if func in _INDEXING:
        near = [v for v in near if v.dtype not in (torch.long, torch.bool)]
    # A CPU scalar may meet any device.
    if distant and any(value.dim() for value in near) and func not in _MOVES:
        raise MixedDevicesError(f"{func} takes tensors of the CPU and of another device")
    device = kwargs.get("device")
    if device is not None:
        is_there = torch.device(device) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    else:
        is_there = bool(distant)
    back: dict[int, _Distant] = {id(value.values): value for value in distant}
    result = func(*_host(args), **_host(kwargs))

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, _Distant):
            return value
        if id(value) in back:  # an operation in place returns what it was given
            return back[id(value)]
        return _Distant(value) if is_there else value

    return tree_map(wrapped, result)


def _host(tree: Any) -> Any:
    unwrap: Callable[[Any], Any] = lambda v: v.values if isinstance(v, _Distant) else v  # noqa: E731
    return tree_map(unwrap, tree)
