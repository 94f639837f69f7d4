"""A pretended device: tensors that are on it mix with the host's no more than a real card's do.

Its numbers are the CPU's. What crosses to it and back is counted, so that a test can say what does,
on a machine without a card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "card:0"
# They look at where a tensor of the host is copied from or to, or take an index of either.
_CROSSING = ("aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_")


class OnCard(torch.Tensor):
    """A tensor on the pretended device."""

    inner: torch.Tensor
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(DEVICE),
            requires_grad=False,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        """As the host has it; subclasses have none of their own."""
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {}, None)


class Card(TorchDispatchMode):
    """Makes tensors on the device, and counts the bytes that cross while it is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.up: list[int] = []
        """Bytes of every copy from the host to the card."""
        self.down: list[int] = []
        """Bytes of every copy from the card to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {}, self)


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any], card: Card | None) -> Any:
    name = func._schema.name
    tensors = list(_tensors(args)) + list(_tensors(tuple(kwargs.values())))
    here = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    if here and name not in _CROSSING:
        elsewhere = [one for one in tensors if not isinstance(one, OnCard) and one.dim()]
        if elsewhere:
            raise RuntimeError(f"{name}: tensors on the card and on the host")
    device = kwargs.get("device")
    on_card = bool(here) if device is None else torch.device(device).type == "card"

    def inside(value: Any) -> Any:
        if isinstance(value, OnCard):
            return value.inner
        return torch.device("cpu") if isinstance(value, torch.device) else value

    if func is torch.ops.aten.mm.dtype:
        # A CPU has none that sums in float32.
        return OnCard(args[0].inner.float() @ args[1].inner.float())
    given = _map(inside, args)
    named = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    found = func(*given, **{key: _map(inside, value) for key, value in named.items()})
    if card is not None and name in ("aten::copy_", "aten::_to_copy") and tensors:
        target = tensors[0] if name == "aten::copy_" else None
        goes_up = isinstance(target, OnCard) if target is not None else on_card
        source = tensors[-1]
        size = source.numel() * source.element_size()
        if goes_up and not isinstance(source, OnCard):
            card.up.append(size)
        elif not goes_up and isinstance(source, OnCard):
            card.down.append(size)
    for argument, one in zip(args, given, strict=True):
        # What was written in place is the tensor that the caller has.
        if isinstance(argument, torch.Tensor) and found is one:
            return argument
    out = kwargs.get("out")
    if out is not None:
        return out

    def outside(value: Any) -> Any:
        is_plain = isinstance(value, torch.Tensor) and not isinstance(value, OnCard)
        return OnCard(value) if is_plain and on_card else value

    return _map(outside, found)


def _map(function: Callable[[Any], Any], value: Any) -> Any:
    """What the function makes of a value, or of all in tuples and lists; pytrees are far slower."""
    if type(value) in (tuple, list):
        return type(value)(_map(function, one) for one in value)
    return function(value)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (tuple, list):
        for one in value:
            yield from _tensors(one)


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# When this is imported, and so before any test: autograd counts devices once in a process. It knows
# one accelerator there, too: beside a pretended one no gradient could be taken on a real one.
if not torch.cuda.is_available():
    backend_registration._setup_privateuseone_for_python_backend("card", _Module())


@contextmanager
def card_in_use() -> Iterator[Card]:
    """A process with a card, as long as the block runs."""
    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **given: Any) -> torch.Tensor:
        # PyTorch's own goes past modes to the device.
        return make(data, **given).to(device)

    with mock.patch.object(torch, "tensor", tensor), Card() as card:
        yield card
