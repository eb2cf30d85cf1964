"""Running a member: one thread at a time in each model, with that member's LoRA adapter alone or with none.

Members may share one model, and callers may share one member between threads. Which adapter runs is therefore a
matter of the thread that runs, not a field of the layers: another thread that runs the plain model meanwhile, or
another guided model on the same base, sees nothing of it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

_OUTSIDE = "(no member is running)"  # no name that an adapter can have
_adapter: ContextVar[str | None] = ContextVar("the adapter that runs in this thread", default=_OUTSIDE)

_locks: WeakKeyDictionary[nn.Module, AbstractContextManager[Any]] = WeakKeyDictionary()
_making_a_lock = threading.Lock()


def adapter_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """The layers of `model` that carry adapters."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def names_on(layer: BaseTunerLayer) -> set[str]:
    """The adapters that a layer carries."""
    return {str(name) for kind in layer.adapter_layer_names for name in getattr(layer, kind, ())}


def share_adapters(model: nn.Module) -> None:
    """Switch the adapters of `model` off, except where `running` says otherwise in a thread; may be called again.

    A class, not another forward on the instance: names of parameters stay, and copies of the model work.
    """
    for layer in adapter_layers(model):
        layer._disable_adapters = True  # a freshly loaded adapter is on, and the base must be its plain self
        layer.__class__ = _by_thread(type(layer))


@contextmanager
def running(model: nn.Module, adapter: str | None) -> Iterator[None]:
    """Run `model`, prepared by `share_adapters`, with one adapter alone or with none, in this thread.

    Another thread that wants to run a member of this model waits: adapters on the weights of experts, and the
    engine's attention, change the model while it runs.
    """
    with _lock(model):
        before = _adapter.set(adapter)
        try:
            yield
        finally:
            _adapter.reset(before)


def _lock(model: nn.Module) -> AbstractContextManager[Any]:
    with _making_a_lock:
        return _locks.setdefault(model, threading.RLock())


class _ByThread:
    """Mixed in before a peft layer's class, whose forward asks these two what to run."""

    @property
    def disable_adapters(self) -> bool:
        adapter = _adapter.get()
        parent: Any = super()
        return bool(parent.disable_adapters) if adapter == _OUTSIDE else adapter is None

    @property
    def active_adapter(self) -> str | list[str]:
        adapter = _adapter.get()
        if adapter is not None and adapter != _OUTSIDE:
            return adapter
        parent: Any = super()
        found: str | list[str] = parent.active_adapter
        return found


@cache
def _by_thread(kind: type[BaseTunerLayer]) -> type[BaseTunerLayer]:
    if issubclass(kind, _ByThread):
        return kind
    return type(kind.__name__, (_ByThread, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})
