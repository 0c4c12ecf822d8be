"""Write what is left of hatify and of other packages in a plain network in torch's own operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from hatify.extract.baking import MaskedNorm
from hatify.extract.plain import DTYPE, NDIM, Plain
from hatify.extract.recording import NormTracer
from hatify.nn.norms import NORMS, is_known, is_torchs
from hatify.ops import Trait, operation_of
from hatify.ops.registry import Resizing


def lower(plain: Plain) -> None:
    """Rewrite normalisations, and what torch could not trace again, in place."""
    identity = nn.Identity()
    for node in list(plain.graph.nodes):
        if node.op == "call_module":
            _lower_norm(plain, node)
        elif node.op == "get_attr":
            _lower_buffer(plain, node, identity)
        else:
            _lower_factory(node)


def _lower_norm(plain: Plain, node: fx.Node) -> None:
    module = plain.root[str(node.target)]
    norm: Any = module.norm if isinstance(module, MaskedNorm) else module
    mask = module.features if isinstance(module, MaskedNorm) else ()
    if not is_known(norm) or (not mask and is_torchs(norm)):
        return
    path = str(node.target)
    x = next(iter((*node.args, *node.kwargs.values())))
    assert isinstance(x, fx.Node)
    if path in plain.root and sum(n.op == "call_module" and n.target == path for n in plain.graph.nodes) == 1:
        del plain.root[path]
    tensors = {id(t): name for name, t in (*norm.named_parameters(), *norm.named_buffers())}
    forward: Any = NORMS[type(norm)] if mask else type(norm).forward
    with plain.graph.inserting_before(node), torch.no_grad():
        tracer = NormTracer(plain, path, tensors, x.meta[DTYPE], x.meta[NDIM])
        result = forward(norm, tracer.proxy(x), *mask).node
    result.meta.update(node.meta)
    node.replace_all_uses_with(result)
    plain.graph.erase_node(node)


def _lower_buffer(plain: Plain, node: fx.Node, identity: nn.Identity) -> None:
    """Hand a buffer that is read alone through a module.

    Unpickling traces the code, where buffers, unlike outputs of modules, are tensors that meet no placeholders.
    """
    value: Any = plain.root[str(node.target)]
    alone = any(user.op == "call_method" or len(user.all_input_nodes) == 1 for user in node.users)
    if isinstance(value, nn.Parameter) or not alone:
        return
    with plain.graph.inserting_after(node):
        held = plain.graph.create_node("call_module", plain.store("buffer", identity), (node,))
    node.replace_all_uses_with(held, delete_user_cb=lambda user: user is not held)


def _lower_factory(node: fx.Node) -> None:
    known = operation_of(node)
    if known is not None and known.resize is not None and Trait.FACTORY in known.traits and node.all_input_nodes:
        node.target, node.args, node.kwargs = known.resize(Resizing(node, node.args, node.kwargs, None, None))
