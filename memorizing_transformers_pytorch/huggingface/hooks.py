"""Hooks of a model, through which its calls are known, also when layers run again for gradient checkpointing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from memorizing_transformers_pytorch.huggingface.calls import Call, deepcopied, refuse_in_backward
from memorizing_transformers_pytorch.utils.context import PerContext


class Checkpointed:
    """The function that transformers runs layers with for gradient checkpointing; the same call is known when a layer
    runs again in the backward pass, in whatever thread."""

    def __init__(self, function: Callable[..., Any], hooks: Hooks) -> None:
        self.function, self._hooks = function, hooks

    def __call__(self, layer: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        call = self._hooks.current.now

        def run(*inputs: Any, **options: Any) -> Any:
            with self._hooks.current.at(call):
                return layer(*inputs, **options)

        return self.function(run, *inputs, **options)


class Hooks:
    """Has each call of a model made by `begin(given, module)`, which may refuse it, or change what it is given, and
    tells `end(call, failed)` of its end.

    The hooks are on every module around the layers: which of them is called first depends on the family, and on
    adapters (PEFT) that go round the outermost one. The first begins the call.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: nn.Module,
        current: PerContext[Call | None],
        begin: Callable[[dict[str, Any], nn.Module], Call],
        end: Callable[[Call, bool], None],
    ) -> None:
        self._model, self.current, self.begin, self._end = model, current, begin, end
        self._handles = []
        for module in _around(model, layer):
            self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Hooks:
        return deepcopied(self, self._model, memo)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._model.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(function, Checkpointed):
                module.__dict__["_gradient_checkpointing_func"] = function.function

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter(self, module: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
        refuse_in_backward()
        self._leave(module, inputs, None)  # if the last one was interrupted: then no hooks are called
        if self.current.now is not None:
            return None
        given = inspect.signature(module.forward).bind_partial(*inputs, **options).arguments
        call = self.begin({**given.pop("kwargs", {}), **given}, module)
        call.module = module
        self.current.put(call)
        if module.training and torch.is_grad_enabled():
            self._follow_checkpoints(module)
        return None if call.prefix is None else ((), call.given)

    def _follow_checkpoints(self, module: nn.Module) -> None:
        for each in module.modules():
            function = each.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, Checkpointed):
                each.__dict__["_gradient_checkpointing_func"] = Checkpointed(function, self)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave(self, module: nn.Module, _inputs: Any, result: Any) -> Any:
        call = self.current.now
        if call is None or call.module is not module:
            return None
        self.current.put(None)
        self._end(call, result is None)
        return _without_cache(result) if call.drops_cache and result is not None else None


def _without_cache(result: Any) -> Any:
    """What a model gives, without a cache that was made for passages alone."""
    if isinstance(result, dict):
        return type(result)(**{name: each for name, each in result.items() if name != "past_key_values"})
    return tuple(each for each in result if not isinstance(each, Cache))


def _around(model: nn.Module, layer: nn.Module) -> Iterator[nn.Module]:
    """The modules around all layers, from the model on."""
    name = next(name for name, module in model.named_modules() if module is layer)
    for part in name.split("."):
        if isinstance(model, nn.ModuleList):
            return
        yield model
        model = getattr(model, part)
