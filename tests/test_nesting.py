"""The converted model keeps the original's tree: blocks are callable parts, and compute what the flat graph does."""

import copy
import pickle
from functools import partial
from types import MethodType

import pytest
import timm
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from hatify import hatify
from hatify.part import Part
from hatify.structure import children_of

WIDTH = 6


class Block(nn.Module):
    """Residual, with a raw parameter, a normalisation, and functional dropout."""

    def __init__(self, width=WIDTH, drop=0.0):
        super().__init__()
        self.fc1, self.norm, self.fc2 = (
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.Linear(2 * width, width),
        )
        self.scale, self.drop = nn.Parameter(torch.rand(width) + 0.5), drop

    def forward(self, x):
        h = F.dropout(F.gelu(self.norm(self.fc1(x))), self.drop, self.training)
        return x + self.scale * self.fc2(h)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.block = nn.Sequential(Block(), Block(drop=0.5)), Block()

    def forward(self, x):
        return self.block(self.inner(x).relu())


class Several(nn.Module):
    """Returns a tuple in a dictionary, one output of which nobody reads, and takes a keyword argument."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, *, other, scale=2.0):
        a = self.a(x)
        return {"pair": (a, self.b(other) * scale), "unused": self.c(a), "constant": 3, "given": x}


class ReadsSeveral(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.several = nn.Linear(WIDTH, WIDTH), Several()

    def forward(self, x):
        h = self.stem(x)
        found = self.several(h, other=x)
        a, b = found["pair"]
        return a * b + found["given"] + found["constant"]


class Same(nn.Module):
    """Returns its input; what it computes is thrown away."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.fc(x)
        return x


class Stashing(nn.Module):
    """Hands on what it does not return."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        self.kept = [self.fc(x)]
        return x.relu()


class ReadsStashed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.stashing = nn.Linear(WIDTH, WIDTH), Stashing()

    def forward(self, x):
        x = self.stashing(self.stem(x))
        return x + self.stashing.kept.pop()


class Twice(nn.Module):
    """One block twice, in the same way, and one that does something else the second time."""

    def __init__(self):
        super().__init__()
        self.same, self.other = Block(), Optional()

    def forward(self, x):
        x = self.same(self.same(x).relu())
        return self.other(x) + self.other(x, again=True)


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, again=False):
        return self.fc(x).tanh() if again else self.fc(x)


class Reaching(nn.Module):
    """Calls a block that belongs to another one, and reads a parameter of it."""

    def __init__(self, other):
        super().__init__()
        self.fc, self.others = nn.Linear(WIDTH, WIDTH), [other]

    def forward(self, x):
        return self.others[0].block(self.fc(x)) * self.others[0].block.scale


class Interleaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.nested = Nested()
        self.reaching = Reaching(self.nested)

    def forward(self, x):
        return self.reaching(self.nested(x))


class Foreign(nn.Module):
    """Reads a parameter of its neighbour."""

    def __init__(self, neighbour):
        super().__init__()
        self.fc, self.neighbours = nn.Linear(WIDTH, WIDTH), [neighbour]

    def forward(self, x):
        return self.fc(x) * self.neighbours[0].scale


class ReadsForeign(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.foreign = Foreign(self.block)

    def forward(self, x):
        return self.foreign(self.block(x))


class TwoModes(nn.Module):
    """A block that takes other paths in training, between two that do not."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = Block(), Changing(), Optional()

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


class Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.aside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x) + self.aside(x) if self.training else self.fc(x)


class Table(nn.ModuleDict):
    """A container with a forward of its own."""

    def forward(self, x):
        return sum(block(x) for block in self.values())


class Frozen(nn.Module):
    """Stays in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def train(self, mode=True):
        return super().train(False)

    def forward(self, x):
        return self.norm(x).relu()


class Kept(nn.Module):
    """Blocks that must stay what they are, around one that need not."""

    def __init__(self):
        super().__init__()
        self.table, self.frozen = Table({"a": Block(), "b": Block()}), Frozen()
        self.graph = Named()

    def forward(self, x):
        return self._modules["graph"](self.frozen(self.table(x)))


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.code = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self._modules["code"](x).relu()


NETS = [Nested, ReadsSeveral, Same, ReadsStashed, Twice, Interleaved, ReadsForeign, TwoModes, Kept]
PARTS = {
    Nested: {"inner.0", "inner.1", "block"},
    ReadsSeveral: {"several"},
    Same: {"0"},
    ReadsStashed: {"stashing"},
    Twice: {"same"},
    Interleaved: {"nested", "nested.block", "nested.inner.0", "nested.inner.1"},
    ReadsForeign: {"block", "foreign"},
    TwoModes: {"first", "middle", "last"},
    Kept: {"table.a", "table.b"},
}


def built(kind):
    torch.manual_seed(0)
    body = kind() if kind is not Same else nn.Sequential(Same())
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), body, nn.Linear(WIDTH, 3))


def parts(model):
    return {name: module for name, module in model.named_modules() if name and isinstance(module, Part)}


def timm_net(name):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=3)
    return net, torch.randn(2, 3, *((160, 160) if "vit" in name else (64, 64)))


def assert_nested_is_flat(model, *inputs):
    """In bits: outputs of both modes and all gradients, and what happens to buffers."""
    model.begin_task(0)
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.randn(model.task_state.num_slots))
    model.mask_scale = 3.0
    for training in (True, False):
        results = []
        for flat in (False, True):
            twin = copy.deepcopy(model).train(training)
            torch.manual_seed(1)
            if flat:
                assert not any(n.op == "call_module" and n.target in parts(twin) for n in twin.flat_graph.nodes)
                out = fx.Interpreter(children_of(twin), graph=twin.flat_graph).run(*inputs)
            else:
                out = twin(*inputs)
            sum(o.square().sum() for o in tree_leaves(out)).backward()
            results.append(
                (tree_leaves(out), {n: p.grad for n, p in twin.named_parameters()}, dict(twin.named_buffers()))
            )
        (out, grads, buffers), (flat_out, flat_grads, flat_buffers) = results
        assert all(torch.equal(a, b) for a, b in zip(out, flat_out, strict=True))
        assert any(grad is not None and grad.any() for grad in grads.values())
        for name, grad in grads.items():
            assert (grad is None) == (flat_grads[name] is None), name
            assert grad is None or torch.equal(grad, flat_grads[name]), name
        assert all(torch.equal(buffer, flat_buffers[name]) for name, buffer in buffers.items())


@pytest.mark.parametrize("kind", NETS)
def test_parts_compute_what_the_flat_graph_does(kind):
    net, x = built(kind), torch.randn(4, WIDTH)
    model = hatify(net, 2, (x,), s_max=10.0)
    assert set(parts(model)) - {"1"} == {f"1.{path}" for path in PARTS[kind]}
    torch.testing.assert_close(model.eval()(x), net.eval()(x))
    assert_nested_is_flat(model, x)


BLOCKS = ("BasicBlock", "Block", "InvertedResidual", "ConvNeXtBlock", "NormFreeBlock")


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_nfnet"])
def test_blocks_of_known_architectures_are_parts(name):
    net, x = timm_net(name)
    model = hatify(net, 2, (x,), s_max=10.0)
    called = {path for path, m in net.named_modules() if type(m).__name__ in BLOCKS}
    assert called and called <= parts(model).keys()
    assert [*dict(model.named_modules())][:3] == [*dict(net.named_modules())][:3]
    assert_nested_is_flat(model, x)


def test_tree_and_code_are_the_originals():
    net, x = timm_net("test_vit")
    model = hatify(net, 2, (x,))
    block = model.blocks[3]
    assert isinstance(block, fx.GraphModule) and type(block).__name__ == "Block" and type(model.blocks) is nn.Sequential
    assert block.code.strip().startswith("def forward(self, x, ")
    assert "self.attn(norm1, attn_qkv" in block.code and "self.mlp(norm2, mlp_fc1" in block.code
    assert block.code == model.blocks[2].code
    assert "self.blocks" in model.code and "self.attn" not in model.code and ".attn(" not in model.code
    assert model.census.flat == ()


def test_the_census_says_what_stays_flat_and_why():
    x = torch.randn(4, WIDTH)
    flat = dict(hatify(built(Kept), 2, (x,)).census.flat)
    assert flat.keys() == {"1", "1.table", "1.frozen", "1.graph"}
    assert "train" in flat["1.frozen"] and "container" in flat["1.table"] and "'code'" in flat["1.graph"]
    model = hatify(built(Twice), 2, (x,))
    ((path, reason),) = model.census.flat
    assert path == "1.other" and reason in str(model.census)
    ((path, reason),) = hatify(built(Interleaved), 2, (x,)).census.flat
    assert path == "1.reaching" and "1.nested.block" in reason
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.census.flat == model.census.flat


class Looked(nn.Module):
    """Only looks a parameter up."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self):
        return self.scale


class LooksUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.looked = nn.Linear(WIDTH, WIDTH), Looked()

    def forward(self, x):
        return self.fc(x) * self.looked()


def test_a_block_without_operations_is_named():
    net, x = built(LooksUp), torch.randn(4, WIDTH)
    model = hatify(net, 2, (x,)).eval()
    assert model.census.flat == (("1.looked", "it computes nothing"),)
    torch.testing.assert_close(model(x), net.eval()(x))
    assert_nested_is_flat(model, x)


def test_overridden_modes_still_hold():
    x = torch.randn(4, WIDTH)
    model = hatify(built(Kept), 2, (x,))
    model.begin_task(0)
    assert not model.get_submodule("1.frozen").training and model.training


def test_a_part_returns_what_the_block_did_and_can_be_called():
    x = torch.randn(4, WIDTH)
    net = built(ReadsSeveral)
    model = hatify(net, 2, (x,)).eval()
    seen = {}
    model.get_submodule("1.several").register_forward_hook(lambda m, given, out: seen.update(given=given, out=out))
    model(x)
    assert seen["out"].keys() == {"pair", "unused", "constant", "given"} and seen["out"]["constant"] == 3
    h = net[0](x)
    expected = net[1].several(net[1].stem(h), other=h)
    for found, wanted in zip(tree_leaves(seen["out"]), tree_leaves(expected), strict=True):
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted))
    again = model.get_submodule("1.several")(*seen["given"])
    assert all(torch.equal(a, b) for a, b in zip(again["pair"], seen["out"]["pair"], strict=True))


def test_hooks_of_the_original_act_once():
    net, x = built(Nested), torch.randn(4, WIDTH)
    net[1].block.register_forward_hook(lambda module, given, out: out + 1)
    torch.testing.assert_close(hatify(net, 2, (x,)).eval()(x), net.eval()(x))


def test_two_modes_share_what_they_can():
    x = torch.randn(4, WIDTH)
    model = hatify(built(TwoModes), 2, (x,))
    found = {path: part._graphs[True] is part._graphs[False] for path, part in parts(model).items()}
    # The first has functional dropout, which is told the mode.
    assert (found["1.first"], found["1.middle"], found["1.last"]) == (False, False, True)
    middle = model.get_submodule("1.middle")
    assert "aside" not in model.eval().get_submodule("1.middle").code
    model.begin_task(0)
    assert "aside" in middle.code
    with torch.no_grad():
        model.task_state.embeddings[0].copy_(torch.randn(model.task_state.num_slots))
    model.end_task()
    assert "aside" not in middle.code


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [Nested, TwoModes, Twice])
def test_copies_have_parts_of_their_own(make, kind):
    x = torch.randn(4, WIDTH)
    model = hatify(built(kind), 2, (x,)).eval()
    twin = make(model)
    assert torch.equal(twin(x), model(x)) and twin.code == model.code and str(twin) == str(model)
    assert parts(twin).keys() == parts(model).keys()
    for path, part in parts(twin).items():
        original = model.get_submodule(path)
        assert part is not original and type(part) is not type(original) and part.graph is not original.graph
        assert type(part).__name__ == type(original).__name__ and part.code == original.code
    before = model(x)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert torch.equal(model(x), before) and not torch.equal(twin(x), before)
    part = make(model.get_submodule("1"))
    assert part.code == model.get_submodule("1").code


def test_activation_checkpoints_of_a_part():
    net, x = timm_net("test_vit")
    results = []
    for checkpointed in (False, True):
        model = hatify(net, 2, (x,), s_max=10.0)
        model.begin_task(0)
        if checkpointed:
            block = model.blocks[3]
            block.forward = partial(checkpoint, MethodType(type(block).forward, block), use_reentrant=False)
        model(x).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_part_can_be_edited_and_compiled():
    x = torch.randn(4, WIDTH)
    model = hatify(built(Nested), 2, (x,)).eval()
    expected = model(x)
    block = model.get_submodule("1.block")
    block.compile(backend="eager")
    assert torch.equal(model(x), expected)
    block = model.get_submodule("1.inner.0")
    (output,) = (node for node in block.graph.nodes if node.op == "output")
    with block.graph.inserting_before(output):
        output.args = (block.graph.call_function(torch.zeros_like, output.args),)
    block.recompile()
    assert not torch.equal(model(x), expected)


def test_state_of_the_original_fits():
    net, x = timm_net("test_resnet")
    model = hatify(net, 2, (x,))
    shared = {name for name, _ in net.named_parameters()} & {name for name, _ in model.named_parameters()}
    assert "layer1.0.conv1.weight" in shared and all(p in model.state_dict() for p in shared)
    assert {p for p, m in net.named_modules() if "." in p} <= {p for p, _ in model.named_modules()}
