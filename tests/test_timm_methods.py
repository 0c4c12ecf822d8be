"""timm's methods on converted models, against those of the original with every mask on."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from hatify import HatError, hatify, load, save, timm_models

CLASSES = 4
NAMES = ["test_resnet", "test_efficientnet", "test_byobnet", "test_convnext", "test_mambaout", "test_vit", "test_vit2"]
OTHERS = ["test_vit3", "test_nfnet", "mobilenetv3_small_050", "repvgg_a0"]
VITS = ["test_vit", "test_vit2", "test_vit3"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module", params=[*NAMES, *OTHERS])
def pair(request):
    return made(request.param)


def made(name, **options):
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=CLASSES, **options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(2, 3, *net.pretrained_cfg["input_size"][1:])
    return net, hatify(net, 2, (x,), s_max=10.0).eval(), x


@torch.no_grad()
def test_features_and_head_are_the_originals(pair):
    net, model, x = pair
    features = model.forward_features(x)
    close(features, net.forward_features(x))
    assert torch.equal(model.forward_head(features), model(x))
    close(model.forward_head(features), net(x))
    close(model.forward_head(features, pre_logits=True), net.forward_head(net.forward_features(x), pre_logits=True))
    before = features.clone()
    model.forward_head(features)
    assert torch.equal(features, before)


@torch.no_grad()
@pytest.mark.parametrize("name", VITS)
def test_intermediate_layers_are_the_originals(name):
    net, model, x = made(name)
    for n in (1, 3, [0, -2]):
        for reshape in (False, True):
            for norm in (False, True):
                for prefix in (False, True):
                    given = {"n": n, "reshape": reshape, "norm": norm, "return_prefix_tokens": prefix}
                    found, expected = model.get_intermediate_layers(x, **given), net.get_intermediate_layers(x, **given)
                    assert len(found) == len(expected)
                    for a, b in zip(found, expected, strict=True):
                        assert type(a) is type(b)
                        for one, other in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                            close(one, other)
    for stop_early in (False, True):
        found, expected = (each.forward_intermediates(x, [0, 1], stop_early=stop_early) for each in (model, net))
        close(found[0], expected[0])
        for a, b in zip(found[1], expected[1], strict=True):
            close(a, b)
    with pytest.raises(ValueError, match="forward_intermediates"):
        model.forward_intermediates(x, indices=99)


@torch.no_grad()
def test_methods_answer_for_the_task_that_is_set():
    _, model, x = made("test_vit")
    model.begin_task(0)
    model.task_state.embeddings[0].copy_(torch.randn(model.task_state.num_slots))
    model.end_task()
    answers = []
    for task in range(2):
        with model.task(task):
            features = model.forward_features(x)
            assert torch.equal(model.forward_head(features), model(x))
            assert model.get_classifier() is model.head[task]
            answers.append(features)
    assert not torch.equal(*answers)
    assert (answers[0] == 0).all(0).any() and not (answers[1] == 0).all(0).any()


def test_gradients_flow_through_the_pieces():
    _, model, x = made("test_resnet")
    model.begin_task(0)
    torch.manual_seed(0)
    twin = copy.deepcopy(model)
    twin(x).square().sum().backward()
    model.forward_head(model.forward_features(x)).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.equal(a.grad, b.grad)), name
    buffers = dict(twin.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


@torch.no_grad()
def test_however_a_model_was_made(tmp_path):
    _, model, x = made("test_resnet")
    expected = model.forward_features(x)
    save(model, tmp_path / "model")
    copies = [load(tmp_path / "model").eval(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for again in copies:
        assert torch.equal(again.forward_features(x), expected)
        assert again.get_classifier() is again.fc[0]
    assert timm_models.PREFIX == "hat_"
    made_by_timm = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=CLASSES).eval()
    assert torch.equal(made_by_timm.forward_head(made_by_timm.forward_features(x)), made_by_timm(x))


def test_only_the_originals_methods_are_offered():
    _, model, _ = made("test_resnet")
    assert not hasattr(model, "get_intermediate_layers") and hasattr(model, "forward_intermediates")
    plain = hatify(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), 2, (torch.randn(2, 4),))
    assert not hasattr(plain, "forward_features") and not hasattr(plain, "get_classifier")


def test_what_cannot_be_offered_says_why():
    _, model, x = made("test_resnet")
    with pytest.raises(HatError, match=r"forward_intermediates\(\): .*vision transformers"):
        model.forward_intermediates(x)
    _, model, x = made("deit_tiny_distilled_patch16_224", depth=2)
    features = model.forward_features(x)
    with pytest.raises(HatError, match=r"forward_head\(pre_logits=True\): .*no single Linear"):
        model.forward_head(features, pre_logits=True)
    model.begin_task(0)
    model.end_task()
    model.set_task(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(HatError, match=r"forward_features\(\): each sample"):
        model.forward_features(x)


class Unclear(nn.Module):
    """Has timm's methods, and asks for features twice, the second time with the input."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward_features(self, x):
        return self.body(x).relu()

    def get_classifier(self):
        return self.head

    def forward(self, x):
        return self.head(self.forward_features(self.forward_features(x)))


def test_features_must_be_clear():
    x = torch.randn(2, 4)
    model = hatify(Unclear(), 2, (x,))
    with pytest.raises(HatError, match=r"forward_features\(\): .*2 times"):
        model.forward_features(x)
