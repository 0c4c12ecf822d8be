"""Find inputs that a network accepts, when the user gives none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from hatify.asking import buffers_restored, in_evaluation
from hatify.errors import ConversionError

# Two samples: with one, a network that squeezes or takes statistics over the batch would be misread.
BATCH = 2
IMAGE_SIZES = (32, 64, 224, 28, 96, 256)


def infer_example_inputs(net: nn.Module) -> tuple[torch.Tensor, ...]:
    """A batch of two random inputs for `net`: of timm's input size, else of a size its first layer accepts.

    Raises:
        ConversionError: ``forward`` takes several inputs, no layer tells the size, or no size tried was accepted.
    """
    required = [
        p.name
        for p in inspect.signature(net.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if len(required) > 1:
        raise ConversionError(
            f"{type(net).__name__}.forward takes {len(required)} inputs ({', '.join(required)}); "
            "pass example_inputs=(…) with one tensor for each"
        )
    tried = []
    for example in _candidates(net):
        if refusal_of(net, (example,)) is None:
            return (example,)
        tried.append(tuple(example.shape))
    found = f"inputs of shape {', '.join(map(str, tried))} were refused" if tried else "no layer tells its input size"
    raise ConversionError(f"{type(net).__name__}: {found}; pass example_inputs=(tensor,)")


def _candidates(net: nn.Module) -> Iterator[torch.Tensor]:
    parameter = next(net.parameters(), torch.empty(0))
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(BATCH, *shape, generator=generator).to(parameter)

    config = getattr(net, "pretrained_cfg", None) or getattr(net, "default_cfg", None) or {}
    size = config.get("input_size") if hasattr(config, "get") else getattr(config, "input_size", None)
    if size is not None:
        yield from _timm_sizes(net, tuple(size), noise)
    for module in net.modules():
        if isinstance(module, nn.Linear):
            yield noise(module.in_features)
            yield noise(8, module.in_features)
        elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield torch.randint(module.num_embeddings, (BATCH, 8), generator=generator).to(parameter.device)
        elif isinstance(module, nn.RNNBase):
            yield noise(8, module.input_size)
        elif isinstance(module, nn.modules.conv._ConvNd):
            for edge in IMAGE_SIZES:
                spatial = len(module.kernel_size)
                edges = (edge,) * spatial if spatial < 3 else (min(edge, 32),) * 3
                yield noise(module.in_channels, *edges)
        else:
            continue
        return


def _timm_sizes(net: nn.Module, size: tuple[int, ...], noise: Any) -> Iterator[torch.Tensor]:
    """timm's nominal size, preceded by what the model was built with, when that differs."""
    patches = getattr(net, "patch_embed", None)
    built = getattr(patches, "img_size", None)
    channels = next((m.in_channels for m in net.modules() if isinstance(m, nn.modules.conv._ConvNd)), size[0])
    if built is not None:
        yield noise(channels, *(built if isinstance(built, (tuple, list)) else (built, built)))
    yield noise(channels, *size[1:])
    yield noise(*size)


@contextmanager
def refusals_named(net: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Iterator[None]:
    """If the context fails because `net` itself does not accept `inputs`, say so."""
    try:
        yield
    except Exception as error:
        refusal = refusal_of(net, inputs)
        if refusal is None:
            raise
        shapes = ", ".join(str(tuple(t.shape)) for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
        raise ConversionError(
            f"{type(net).__name__} does not accept the example inputs, of shape {shapes}: {refusal}"
        ) from error


def refusal_of(net: nn.Module, inputs: tuple[Any, ...] | dict[str, Any]) -> Exception | None:
    """What `net` raises when it is called with `inputs` in evaluation mode; None if it answers."""
    try:
        with in_evaluation(net), buffers_restored(net), torch.no_grad(), torch.random.fork_rng(devices=[]):
            _ = net(**inputs) if isinstance(inputs, dict) else net(*inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        return error
    return None
