"""Record a normalisation in torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import GraphAppendingTracer

from hatify.extract.plain import Plain


class NormTracer(GraphAppendingTracer):
    """Records a normalisation; all that does not depend on its input becomes a constant."""

    def __init__(self, plain: Plain, path: str, tensors: dict[int, str], dtype: torch.dtype, ndim: int) -> None:
        super().__init__(plain.graph)
        self.plain, self.path, self.tensors, self.dtype, self.ndim = plain, path, tensors, dtype, ndim

    def proxy(self, node: fx.Node) -> _NormProxy:
        return _NormProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Proxy:
        for name in ("weight", "bias"):
            value = kwargs.get(name)
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                kwargs = {**kwargs, name: nn.Parameter(value.detach())}
                self.tensors[id(kwargs[name])] = name
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def create_arg(self, a: Any) -> Any:
        if not isinstance(a, Tensor):
            return super().create_arg(a)
        return self.plain.get(f"{self.path}.{self.tensors.get(id(a), 'constant')}", a)


class _NormProxy(fx.Proxy):
    tracer: NormTracer

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.node.target == "float" else self.tracer.dtype

    @property
    def ndim(self) -> int:
        return self.tracer.ndim

    def dim(self) -> int:
        return self.tracer.ndim
