"""Tracing: modes, arguments, outputs, buffers, names, and what cannot be traced."""

import contextlib
import dataclasses
import inspect
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hatify import ConversionError, HatError, TaskError, hatify, verify_isolation

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*no feature is left:hatify.HatWarning")

INPUTS = 4


@pytest.fixture
def x():
    return torch.randn(3, INPUTS)


class Base(nn.Module):
    """Two layers; subclasses say what happens to the features between them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(INPUTS, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.features(self.body(x)))


def assert_same_function(net, model, *args, **kwargs):
    """The model answers as the network does, in evaluation and in training, with the same random numbers."""
    for mode in (False, True):
        net.train(mode)
        model.train(mode)
        if mode and model.active_task is None:
            model.begin_task(0)
        torch.manual_seed(0)
        expected = net(*args, **kwargs)
        torch.manual_seed(0)
        actual = model(*args, **kwargs)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    model.abort_task()


# Modes ----------------------------------------------------------------------------------------------------------------


class BareIf(Base):
    def features(self, x):
        if self.training:
            return torch.tanh(x)
        return x.relu() + 1


class FunctionalDropout(Base):
    def features(self, x):
        return F.dropout(x, 0.5, self.training)


class FeatureDropout(Base):
    def features(self, x):
        return F.dropout2d(x[:, :, None, None], p=0.5, training=self.training)[:, :, 0, 0]


class NotTraining(Base):
    def features(self, x):
        return torch.where(torch.tensor(not self.training), x, -x)


class ScaleByMode(Base):
    def features(self, x):
        return x * (0.5 if self.training else 2.0)


class Child(Base):
    """The flag is read in a child, which has a child of its own."""

    def __init__(self):
        super().__init__()

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.act = nn.ReLU()

            def forward(self, x):
                return self.act(x) * 3 if self.training else self.act(x)

        self.features = nn.Sequential(Inner())


class LeafChild(Base):
    """A drop-path of the usual kind: no children, no parameters, reads the flag."""

    def __init__(self):
        super().__init__()

        class DropPath(nn.Module):
            def forward(self, x):
                if not self.training:
                    return x
                return x * (torch.rand(x.shape[0], 1) < 0.5)

        self.features = DropPath()


class ChildWithWeights(Base):
    def __init__(self):
        super().__init__()

        class Inner(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(6, 6)

            def forward(self, x):
                return self.fc(x) if self.training else x

        self.features = Inner()


class AttentionDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(INPUTS, 24)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        q, k, v = self.qkv(x.unsqueeze(1).repeat(1, 3, 1)).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.head(y.mean(1))


MODES = [
    BareIf,
    FunctionalDropout,
    FeatureDropout,
    NotTraining,
    ScaleByMode,
    Child,
    LeafChild,
    ChildWithWeights,
    AttentionDropout,
]


@pytest.mark.parametrize("kind", MODES)
def test_training_and_evaluation_differ_as_in_the_original(kind, x):
    net = kind()
    torch.manual_seed(0)
    training = net.train()(x)
    assert not torch.allclose(training, net.eval()(x)), "the modes do not differ, so the test shows nothing"
    assert_same_function(net, hatify(net, 2, (x,)), x)


@pytest.mark.parametrize("kind", MODES)
def test_what_depends_on_the_mode_is_isolated(kind, x):
    model = hatify(kind(), 2, (x,))
    answers = []
    for task in range(2):
        model.begin_task(task)
        with torch.no_grad():
            model.task_state.embeddings[task].copy_(torch.randn(model.task_state.num_slots))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        model.end_task()
        with model.task(0):
            answers.append(model(x))
    assert torch.equal(*answers)
    verify_isolation(model)


def test_constants_that_differ_by_mode_need_one_graph_only(x):
    model = hatify(FunctionalDropout(), 1, (x,))
    code = model.eval().code
    assert "self.training" in code
    model.begin_task(0)
    assert model.code == code


def test_structure_that_differs_by_mode_switches_graphs(x):
    model = hatify(BareIf(), 1, (x,))
    assert "tanh" not in model.eval().code
    model.begin_task(0)
    assert "tanh" in model.code
    model.end_task()
    assert "tanh" not in model.code


def test_a_child_keeps_a_mode_of_its_own(x):
    model = hatify(nn.Sequential(nn.Linear(INPUTS, 6), nn.Dropout(0.5), nn.Linear(6, 2)), 1, (x,))
    model.begin_task(0)
    assert not torch.equal(model(x), model(x))
    model.get_submodule("1").eval()
    assert torch.equal(model(x), model(x))


def test_a_child_in_a_mode_of_its_own_is_followed_or_refused(x):
    # The usual way to freeze a part: train() the whole, eval() the part.
    net = Child()
    model = hatify(net, 1, (x,))
    model.begin_task(0)
    for each in (net, model):
        each.train()
        each.get_submodule("features").eval()
    try:
        actual = model(x)
    except TaskError as error:
        assert "features" in str(error)
    else:
        torch.testing.assert_close(actual, net(x))


def test_the_modes_of_the_network_are_left_as_they_were(x):
    net = Child().train()
    net.features[0].eval()
    before = [m.training for m in net.modules()]
    model = hatify(net, 1, (x,))
    assert [m.training for m in net.modules()] == before
    assert not model.get_submodule("features.0").training


# Arguments ------------------------------------------------------------------------------------------------------------


class Optional(Base):
    def forward(self, x, bias: Tensor | None = None, scale: float = 2.0, mode: str = "plain", flip: bool = False):
        x = self.body(x) * scale
        if bias is not None:
            x = x + bias
        if mode == "relu":
            x = x.relu()
        return self.head(-x if flip else x)


def test_arguments_that_are_left_out_have_their_defaults(x):
    net = Optional()
    model = hatify(net, 1, (x,))
    assert_same_function(net, model, x)
    assert_same_function(net, model, x, None, 2.0, "plain", False)
    assert_same_function(net, model, x=x, scale=2.0)


def test_arguments_that_are_given_are_used(x):
    net, bias = Optional(), torch.randn(6)
    model = hatify(net, 1, (x, bias, 0.5, "relu", True))
    assert_same_function(net, model, x, bias, 0.5, "relu", True)
    assert_same_function(net, model, x, bias, scale=0.5, mode="relu", flip=True)


def test_example_inputs_may_be_given_by_name(x):
    net, bias = Optional(), torch.randn(6)
    model = hatify(net, 1, {"x": x, "bias": bias})
    assert_same_function(net, model, x=x, bias=bias)
    assert_same_function(net, model, x, bias)


def test_a_single_tensor_may_be_given_as_it_is(x):
    assert hatify(Base2(), 1, x).example_inputs == (x,)


class Base2(Base):
    def features(self, x):
        return x.relu()


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"scale": 3.0}, id="number"),
        pytest.param({"mode": "relu"}, id="string"),
        pytest.param({"flip": True}, id="flag"),
        pytest.param({"bias": torch.ones(6)}, id="tensor"),
    ],
)
def test_another_value_for_a_fixed_argument_is_refused(x, other):
    model = hatify(Optional(), 1, (x,)).eval()
    with pytest.raises((AssertionError, HatError), match=next(iter(other))):
        model(x, **other)


class KeywordOnly(Base):
    def forward(self, x, *, shift, scale=1.0):
        return self.head(self.body(x) * scale + shift)


def test_keyword_only_arguments_are_passed_by_keyword(x):
    net, shift = KeywordOnly(), torch.randn(6)
    model = hatify(net, 1, {"x": x, "shift": shift})
    assert_same_function(net, model, x, shift=shift)
    assert_same_function(net, model, x=x, shift=shift, scale=1.0)


class NamedLikeABuiltin(Base):
    def forward(self, input, id=None, type=1):
        return self.head(self.body(input)) * type


def test_argument_names_are_kept(x):
    net = NamedLikeABuiltin()
    model = hatify(net, 1, (x,))
    assert list(inspect.signature(model.forward).parameters) == ["input", "id", "type"]
    assert_same_function(net, model, input=x)
    assert_same_function(net, model, input=x, id=None, type=1)


class Several(Base):
    def forward(self, a, b):
        return self.head(self.body(a) + self.body(b).tanh())


def test_several_inputs(x):
    net = Several()
    assert_same_function(net, hatify(net, 1, (x, 2 * x)), x, 2 * x)
    assert_same_function(net, hatify(net, 1, {"b": 2 * x, "a": x}), x, b=2 * x)


class Variadic(Base):
    def forward(self, *xs):
        return self.head(self.body(xs[0]) + self.body(xs[1]).tanh())


class ListInput(Base):
    def forward(self, xs):
        return self.head(self.body(xs[0]) + self.body(xs[1]).tanh())


class DictInput(Base):
    def forward(self, batch):
        return self.head(self.body(batch["a"]) + self.body(batch["b"]).tanh())


@pytest.mark.parametrize(
    ("kind", "pack"),
    [
        (Variadic, lambda a, b: (a, b)),
        (ListInput, lambda a, b: ([a, b],)),
        (DictInput, lambda a, b: ({"a": a, "b": b},)),
    ],
)
def test_containers_of_inputs(kind, pack, x):
    net, args = kind(), pack(x, 2 * x)
    assert_same_function(net, hatify(net, 1, args), *args)


@pytest.mark.parametrize("given", [(), (1, 2), {"y": 1}])
def test_example_inputs_that_do_not_fit_are_refused(given):
    with pytest.raises(ConversionError, match=r"Base2\.forward\(.*x\).*example_inputs"):
        hatify(Base2(), 1, given)


# Outputs --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Output:
    logits: Tensor
    features: Tensor
    loss: Tensor | None = None


class TupleOutput(Base):
    def forward(self, x):
        x = self.body(x)
        return self.head(x), (x, [x + 1])


class DictOutput(Base):
    def forward(self, x):
        x = self.body(x)
        return {"logits": self.head(x), "hidden": {"features": x, "nothing": None, "number": 3}}


class DataclassOutput(Base):
    def forward(self, x):
        x = self.body(x)
        return Output(self.head(x), features=x)


@pytest.mark.parametrize("kind", [TupleOutput, DictOutput])
def test_containers_of_outputs(kind, x):
    net = kind()
    assert_same_function(net, hatify(net, 1, (x,)), x)


def test_dataclass_outputs(x):
    net = DataclassOutput()
    model = hatify(net, 1, (x,))
    expected, actual = net.eval()(x), model.eval()(x)
    assert type(actual) is Output and actual.loss is None
    torch.testing.assert_close(actual.logits, expected.logits)
    torch.testing.assert_close(actual.features, expected.features)


# Buffers --------------------------------------------------------------------------------------------------------------


class WritesBuffer(Base):
    """A running mean kept by hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def features(self, x):
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x - self.mean


class CountsInPlace(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def features(self, x):
        self.count.add_(1)
        return x * self.count


class CountsByAssignment(CountsInPlace):
    def features(self, x):
        self.count = self.count + 1
        return x * self.count


class CountsByAugmentedAssignment(CountsInPlace):
    def features(self, x):
        self.count += 1
        return x * self.count


@pytest.mark.parametrize("kind", [WritesBuffer, CountsInPlace])
def test_buffers_written_in_place_go_on_being_written(kind, x):
    net = kind()
    model = hatify(net, 2, (x,))
    assert_same_function(net, model, x)


def test_a_buffer_written_in_training_is_each_tasks_own(x):
    net = WritesBuffer()
    model = hatify(net, 2, (x,))
    assert {e.name: e.policy for e in model.census}["mean"] == "per_task"
    model.begin_task(0)
    model(x)
    model.end_task()
    with model.task(0):
        expected = model(x)
    model.begin_task(1)
    for _ in range(3):
        model(x + 5)
    model.end_task()
    with model.task(0):
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", [CountsByAssignment, CountsByAugmentedAssignment])
def test_buffers_written_by_assignment_are_followed_or_refused_but_never_frozen(kind, x):
    net = kind()
    try:
        model = hatify(net, 1, (x,))
    except ConversionError as error:
        assert kind.__name__ in str(error) and re.search(r"test_trace\.py:\d+", str(error))
    else:
        assert_same_function(net, model, x)
        assert_same_function(net, model, x)


def test_tracing_leaves_buffers_of_the_network_alone(x):
    net = CountsByAugmentedAssignment()
    with contextlib.suppress(ConversionError):
        hatify(net, 1, (x,))
    assert net.count == 0


class BufferInControlFlow(Base):
    def __init__(self):
        super().__init__()
        self.register_buffer("doubled", torch.tensor(True))

    def features(self, x):
        return 2 * x if self.doubled else x


def test_constant_buffers_may_decide_what_is_computed(x):
    net = BufferInControlFlow()
    assert_same_function(net, hatify(net, 1, (x,)), x)


class MakesConstants(Base):
    def features(self, x):
        return x + torch.arange(6) * torch.ones(6, dtype=torch.float32)


def test_constants_made_while_tracing_are_moved_with_the_model(x):
    net = MakesConstants()
    model = hatify(net, 1, (x,))
    assert_same_function(net, model, x)
    expected = net.double().eval()(x.double())
    torch.testing.assert_close(model.double().eval()(x.double()), expected)


# What cannot be traced ------------------------------------------------------------------------------------------------


class ControlFlow(nn.Module):
    def __init__(self, weighted):
        super().__init__()
        if weighted:
            self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        if x.sum() > 0:
            return x * getattr(self, "scale", 2.0)
        return x


class InChild(Base):
    def __init__(self, weighted=True):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(), ControlFlow(weighted))

    def features(self, x):
        return self.block(x)


class InRoot(Base):
    def features(self, x):
        if x.sum() > 0:
            return 2 * x
        return x


def line_of(function, text):
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


def test_control_flow_in_a_child_is_refused_naming_module_and_line(x):
    line = line_of(ControlFlow.forward, "x.sum() > 0")
    with pytest.raises(ConversionError) as caught:
        hatify(InChild(), 2, (x,))
    message = str(caught.value)
    assert message.startswith("block.1 (ControlFlow): cannot be traced: ")
    assert f"test_trace.py:{line}:" in message
    assert "policies={'block.1': 'per_task'}" in message


def test_control_flow_in_the_root_is_refused_naming_class_and_line(x):
    line = line_of(InRoot.features, "x.sum() > 0")
    with pytest.raises(ConversionError) as caught:
        hatify(InRoot(), 2, (x,))
    message = str(caught.value)
    assert "InRoot" in message and f"test_trace.py:{line}:" in message and "policies" in message


@pytest.mark.parametrize("weighted", [True, False])
def test_following_the_hint_makes_it_convert(weighted, x):
    net = InChild(weighted)
    with pytest.raises(ConversionError) as caught:
        hatify(net, 2, (x,))
    name = re.search(r"policies=\{'([\w.]+)': 'per_task'\}", str(caught.value))[1]
    model = hatify(net, 2, (x,), policies={name: "per_task"})
    for signed in (x, -x):
        assert_same_function(net, model, signed)
    model.begin_task(0)
    model.end_task()
    verify_isolation(model, (x,))


def test_conversion_errors_chain_the_original(x):
    with pytest.raises(ConversionError) as caught:
        hatify(InRoot(), 2, (x,))
    assert caught.value.__cause__ is not None


def test_lazy_modules_must_have_been_run():
    net = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ConversionError, match=r"lazy modules.*run it"):
        hatify(net, 2, (torch.randn(2, INPUTS),))
    net(torch.randn(2, INPUTS))
    hatify(net, 2, (torch.randn(2, INPUTS),))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (torch.jit.script, "scripted network"),
        (nn.DataParallel, r"\.module"),
        (lambda net: torch.compile(net, backend="eager"), r"\._orig_mod"),
    ],
    ids=["script", "DataParallel", "compile"],
)
def test_wrapped_networks_are_refused_naming_what_to_convert(wrap, named, x):
    with pytest.raises(ConversionError, match=named):
        hatify(wrap(nn.Sequential(nn.Linear(INPUTS, 3), nn.ReLU(), nn.Linear(3, 2))), 2, (x,))


@pytest.mark.parametrize("thing", [None, "resnet18", torch.relu, nn.Linear])
def test_only_modules_are_converted(thing):
    with pytest.raises(ConversionError, match=r"torch\.nn\.Module"):
        hatify(thing, 2, (torch.randn(2, INPUTS),))


# Names ----------------------------------------------------------------------------------------------------------------

NAMES = [
    "task",
    "masks",
    "head",
    "graph",
    "code",
    "meta",
    "begin_task",
    "end_task",
    "census",
    "uses",
    "constants",
    "num_tasks",
    "finished_tasks",
    "mask_scale",
    "s_max",
    "regularization",
    "example_inputs",
    "recompile",
    "shape",
    "training_",
    "guard",
    "_graph",
    "_owners",
]


class Named(nn.Module):
    """The hidden layer, or its scale, has the given name; the network reaches it without going through attributes."""

    def __init__(self, name, nested=False, parameter=False):
        super().__init__()
        owner = nn.Module() if nested else self
        if nested:
            self.block = owner
        if parameter:
            owner._parameters[name] = nn.Parameter(torch.rand(INPUTS) + 0.5)
        else:
            owner._modules[name] = nn.Linear(INPUTS, INPUTS)
        self.name, self.nested, self.parameter = name, nested, parameter
        self.stem, self.last = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, 2)

    def forward(self, x):
        owner = self._modules["block"] if self.nested else self
        x = self.stem(x)
        if self.parameter:
            return self.last(x * getattr(owner, self.name))
        return self.last(owner._modules[self.name](x).relu())


@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("name", NAMES)
def test_children_may_have_any_name(name, nested, x):
    net = Named(name, nested)
    expected = net.eval()(x)
    model = hatify(net, 2, (x,)).eval()
    torch.testing.assert_close(model(x), expected)
    path = f"block.{name}" if nested else name
    assert f"{path}.weight" in model.state_dict()
    model.begin_task(0)
    model(x).sum().backward()
    assert (dict(model.named_parameters())[f"{path}.weight"].grad != 0).any()
    with pytest.raises(TaskError):
        model.begin_task(1)
    model.end_task()
    verify_isolation(model)
    assert path in model.masks(0)
    assert model.num_tasks == 2 and model.finished_tasks == (0,)


@pytest.mark.parametrize("nested", [False, True], ids=["root", "nested"])
@pytest.mark.parametrize("name", ["train", "eval", "to", "state_dict"])
def test_children_named_like_methods_of_every_module_convert_or_are_refused(name, nested, x):
    # torch allows these names as well, though only a network that goes around attributes can use such a child.
    net = Named(name, nested)
    expected = net.eval()(x)
    try:
        model = hatify(net, 2, (x,))
    except ConversionError as error:
        assert repr(f"block.{name}" if nested else name) in str(error)
    else:
        torch.testing.assert_close(model.eval()(x), expected)


@pytest.mark.parametrize("name", ["task", "masks", "graph", "census", "mask_scale"])
def test_raw_parameters_may_have_any_name_that_a_module_allows(name, x):
    net = Named(name, parameter=True)
    expected = net.eval()(x)
    model = hatify(net, 2, (x,)).eval()
    torch.testing.assert_close(model(x), expected)
    assert name in model.state_dict()
    model.begin_task(0)
    model.end_task()
    verify_isolation(model)


class AttributesOfItsOwn(Base2):
    """Plain attributes with names of the model's own."""

    def __init__(self):
        super().__init__()
        self.s_max, self.num_features, self.tag = "mine", 6, "a tag"


def test_plain_attributes_are_kept_and_ours_win(x):
    model = hatify(AttributesOfItsOwn(), 2, (x,), s_max=7.0)
    assert model.s_max == 7.0
    assert (model.num_features, model.tag) == (6, "a tag")


def test_the_reserved_name_is_refused(x):
    net = Base2()
    net._hat = nn.Linear(2, 2)
    with pytest.raises(ConversionError, match=r"'_hat'.*reserved"):
        hatify(net, 2, (x,))


def test_a_buffer_of_the_reserved_name_is_refused(x):
    net = Base2()
    net.register_buffer("_hat", torch.zeros(2))
    with pytest.raises(ConversionError, match=r"'_hat'.*reserved"):
        hatify(net, 2, (x,))


# Arguments that are no tensors ---------------------------------------------------------------------------------------


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(INPUTS, 6), nn.Linear(6, 2)

    def forward(self, x, k=2, flag=None, name="a"):
        return self.head(self.first(x) * k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "with k=2 and computes .* not with 3"),
        ((torch.ones(3),), "with k=2 and computes .* not with a tensor"),
        ((2, True), "with flag=None and computes .* not with True"),
        ((2, None, "c"), "with name='b' and computes .* not with 'c'"),
    ],
)
def test_another_value_of_an_argument_that_is_no_tensor_is_refused(arguments, message, x):
    net = Scaled().eval()
    model = hatify(net, 2, (x, 2, None, "b")).eval()
    assert torch.equal(model(x, 2, None, "b"), net(x))
    with pytest.raises(HatError, match=message):
        model(x, *arguments)


# Writing to parameters -----------------------------------------------------------------------------------------------


def test_a_forward_that_writes_to_a_parameter_is_refused_by_name(x):
    class Normalising(Scaled):
        def forward(self, x):
            with torch.no_grad():
                self.first.weight.div_(self.first.weight.norm())
            return self.head(self.first(x))

    with pytest.raises(ConversionError, match=r"first\.weight: forward writes to this parameter in place \(div_\)"):
        hatify(Normalising(), 2, (x,))
