"""Finding inputs that a network accepts, when the user gives none."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from hatify import ConversionError, hatify
from hatify.examples import BATCH, infer_example_inputs


def shape_of(net):
    (example,) = infer_example_inputs(net)
    return tuple(example.shape)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        pytest.param(nn.Linear(7, 3), (BATCH, 7), id="linear"),
        pytest.param(nn.Sequential(nn.ReLU(), nn.Linear(7, 3)), (BATCH, 7), id="first layer is not the first child"),
        pytest.param(nn.Sequential(nn.BatchNorm1d(7), nn.Linear(7, 3)), (BATCH, 7), id="norm first"),
        pytest.param(nn.Conv1d(5, 3, 3), (BATCH, 5, 32), id="conv1d"),
        pytest.param(nn.Conv2d(5, 3, 3), (BATCH, 5, 32, 32), id="conv2d"),
        pytest.param(nn.Conv3d(5, 3, 3), (BATCH, 5, 32, 32, 32), id="conv3d"),
        pytest.param(nn.ConvTranspose2d(5, 3, 3), (BATCH, 5, 32, 32), id="transposed"),
        pytest.param(nn.GRU(7, 3), (BATCH, 8, 7), id="recurrent"),
        pytest.param(nn.Embedding(11, 3), (BATCH, 8), id="embedding"),
        pytest.param(nn.EmbeddingBag(11, 3), (BATCH, 8), id="embedding bag"),
    ],
)
def test_the_first_layer_tells_the_size(net, shape):
    assert shape_of(net) == shape


@pytest.mark.parametrize("edge", [28, 64, 96, 224])
def test_images_are_tried_in_several_sizes(edge):
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * edge * edge, 3))
    assert shape_of(net) == (BATCH, 1, edge, edge)


def test_sequences_of_vectors_are_tried_where_single_vectors_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(7, 6)
            self.conv = nn.Conv1d(6, 2, 3)

        def forward(self, x):
            return self.conv(self.stem(x).transpose(1, 2))

    assert shape_of(Net()) == (BATCH, 8, 7)


def test_ids_lie_within_the_vocabulary():
    (ids,) = infer_example_inputs(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)))
    assert ids.dtype == torch.int64 and set(ids.flatten().tolist()) <= {0, 1, 2}


def test_there_are_two_samples():
    assert BATCH == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_have_the_precision_of_the_network(dtype):
    (example,) = infer_example_inputs(nn.Linear(3, 2).to(dtype))
    assert example.dtype == dtype


def test_the_same_network_gets_the_same_inputs_whatever_the_seed():
    torch.manual_seed(1)
    (a,) = infer_example_inputs(nn.Linear(3, 2))
    torch.manual_seed(2)
    (b,) = infer_example_inputs(nn.Linear(3, 2))
    assert torch.equal(a, b)


def test_trying_leaves_the_network_and_the_random_numbers_alone():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Noise(), nn.Linear(4, 2))
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    infer_example_inputs(net)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in net] == [True, False, True, True]


# timm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("resnet18", {}, (3, 224, 224)),
        ("resnet18", {"in_chans": 1}, (1, 224, 224)),
        ("vit_tiny_patch16_224", {"depth": 1}, (3, 224, 224)),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": 32}, (3, 32, 32)),
        ("vit_tiny_patch16_224", {"depth": 1, "img_size": (32, 64), "in_chans": 4}, (4, 32, 64)),
    ],
)
def test_timm_models_get_the_size_they_were_built_for(name, options, shape):
    assert shape_of(timm.create_model(name, **options)) == (BATCH, *shape)


@pytest.mark.parametrize("config", [{"input_size": (3, 40, 48)}, SimpleNamespace(input_size=(3, 40, 48))])
@pytest.mark.parametrize("attribute", ["pretrained_cfg", "default_cfg"])
def test_configurations_like_timms_are_read(config, attribute):
    net = nn.Conv2d(3, 4, 3)
    setattr(net, attribute, config)
    assert shape_of(net) == (BATCH, 3, 40, 48)


# Errors ---------------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, image, question, scale=1.0):
        return self.fc(image) + self.fc(question) * scale


class NoLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale


class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        return self.fc(x.view(2, 3, 5, 7).transpose(2, 3))


def test_several_inputs_must_be_given():
    with pytest.raises(ConversionError, match=r"TwoInputs\.forward takes 2 inputs \(image, question\).*example_inputs"):
        hatify(TwoInputs(), 2)


def test_inputs_with_defaults_need_not_be_given():
    class Net(TwoInputs):
        def forward(self, image, question=None, scale=1.0):
            return self.fc(image) * scale

    assert shape_of(Net()) == (BATCH, 3)


def test_a_network_that_does_not_tell_its_size_says_so():
    with pytest.raises(ConversionError, match=r"NoLayer: no layer tells its input size; pass example_inputs"):
        hatify(NoLayer(), 2)


def test_inputs_that_were_refused_are_listed():
    with pytest.raises(ConversionError, match=r"Picky: .*\(2, 5\), \(2, 8, 5\).*refused.*pass example_inputs"):
        hatify(Picky(), 2)


def test_the_networks_own_errors_are_not_taken_for_a_refusal_of_the_size():
    class Broken(nn.Linear):
        def forward(self, x):
            raise KeyError("a mistake in the network")

    with pytest.raises(KeyError, match="a mistake in the network"):
        hatify(nn.Sequential(Broken(3, 2)), 2)


@pytest.mark.parametrize("given", [(torch.zeros(2, 5),), {"input": torch.zeros(2, 5)}, (torch.zeros(2, 3).long(),)])
def test_given_inputs_that_the_network_refuses_are_an_error_of_the_conversion(given):
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ConversionError, match="example inputs"):
        hatify(net, 2, given)


def test_inputs_that_are_given_are_not_second_guessed():
    x = torch.randn(2, 3, 5, 7)
    model = hatify(Picky(), 2, (x,))
    assert model.example_inputs == (x,)


def test_inferred_inputs_are_remembered():
    model = hatify(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), 2)
    assert [tuple(t.shape) for t in model.example_inputs] == [(BATCH, 3)]
