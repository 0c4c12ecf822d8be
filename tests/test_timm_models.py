"""A cross-section of timm's architectures: same function, isolated tasks, parameters mostly shared."""

from dataclasses import dataclass, field

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from hatify import hatify, verify_isolation

# Capacity is not what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")

CLASSES = 4


@dataclass(frozen=True)
class Case:
    """A model, the size of its images, and how much of it tasks share at least."""

    name: str
    edge: int = 64
    shared: float = 0.95
    options: dict = field(default_factory=dict)
    about: str = ""


CASES = [
    Case("test_resnet", about="residual stages"),
    Case("test_efficientnet", shared=0.9, about="depthwise convolutions, squeeze and excitation"),
    Case("test_byobnet", about="several kinds of blocks and of attention over channels"),
    Case("test_convnext", about="LayerNorm2d, LayerScale"),
    Case("test_mambaout", about="gated blocks, channels last"),
    Case("test_vit", edge=160, about="class token, position embedding"),
    Case("test_vit3", edge=160, about="query and key norms, register tokens, attention pooling"),
    Case("test_nfnet", edge=96, shared=0.6, about="standardised convolutions"),
    Case("mobilenetv3_small_050", about="hard activations"),
    Case("ghostnet_050", about="features joined by concatenation"),
    Case("repvgg_a0", about="parallel branches that are added"),
    Case("edgenext_xx_small", about="attention between channels, split and joined"),
    Case("efficientvit_b0", shared=0.8, about="linear attention over several scales"),
    Case("pvt_v2_b0", about="overlapping patches, attention over reduced positions"),
    Case("cait_xxs24_224", options={"depth": 2, "img_size": 64}, about="talking heads, class attention"),
    Case(
        "swin_tiny_patch4_window7_224",
        options={"img_size": 64, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32},
        about="shifted windows, relative position tables, patch merging",
    ),
    Case(
        "swinv2_cr_tiny_ns_224",
        options={"img_size": 64, "window_size": 4, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32},
        about="positions through a network of their own, cosine attention",
    ),
    Case("volo_d1_224", options={"img_size": 64}, about="outlook attention: unfold and fold"),
    Case("tresnet_m", edge=64, options={"layers": (1, 1, 1, 1)}, about="blurred pooling, space to depth"),
    Case("resnest14d", edge=64, options={"layers": (1, 1, 1, 1)}, about="split attention"),
    Case("levit_128s", edge=224, about="convolutional attention with learned biases, BatchNorm1d over tokens"),
    Case("deit_tiny_distilled_patch16_224", options={"depth": 2, "img_size": 64}, about="two class tokens, two heads"),
    Case(
        "beit_base_patch16_224",
        options={"depth": 2, "img_size": 64, "embed_dim": 96, "num_heads": 3},
        about="gathered relative positions",
    ),
    Case("mixer_s32_224", options={"img_size": 64}, about="layers over positions"),
    Case(
        "xcit_nano_12_p16_224",
        options={"depth": 2, "img_size": 64},
        about="attention between channels, class attention",
    ),
    Case("tnt_s_patch16_224", options={"depth": 2, "img_size": 64}, about="transformers in transformers"),
    Case("mobilevit_xxs", edge=64, about="unfolded patches between convolutions"),
    Case("densenet121", edge=64, options={"block_config": (2, 2, 2, 2)}, about="dense concatenations"),
    Case("lowformer_b0", edge=64, about="a timm Linear in front of the head"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def converted(request):
    """A case, the model it names with nothing in it zero or equal by design, images, and what it converts to."""
    torch.manual_seed(0)
    case = request.param
    net = timm.create_model(case.name, num_classes=CLASSES, **case.options)
    x = torch.randn(3, 3, case.edge, case.edge)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for norm in norms:
            norm.momentum = 1.0
        net.train()(x)
        for norm in norms:
            norm.momentum = 0.1
    return case, net, x, hatify(net, 2, (x,), s_max=10.0)


@torch.no_grad()
def outputs(model, task, x):
    with model.task(task):
        return model.eval()(x)


def learn(model, task, x):
    model.begin_task(task)
    slots = torch.arange(model.task_state.num_slots)
    with torch.no_grad():
        model.task_state.embeddings[task].copy_(torch.where(slots % (2 + task) == 0, 1.0, -1.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), torch.arange(len(x)) % CLASSES) + model.regularization()).backward()
        optimizer.step()
    model.end_task()


def test_most_parameters_are_shared_and_all_are_accounted_for(converted):
    case, net, _, model = converted
    named = [name for name, _ in (*net.named_parameters(), *net.named_buffers())]
    assert sorted(entry.name for entry in model.census) == sorted(named)
    assert "unused" not in {str(entry.policy) for entry in model.census}
    sizes = {entry: torch.Size(entry.shape).numel() for entry in model.census if entry.kind == "parameter"}
    shared = sum(n for entry, n in sizes.items() if str(entry.policy) in ("shared", "row", "masked", "unmasked"))
    assert shared >= case.shared * sum(sizes.values())


def test_the_function_is_kept_and_tasks_are_isolated(converted):
    _, net, x, model = converted
    with torch.no_grad():
        expected = net.eval()(x)
    assert expected.isfinite().all() and expected.std(0).min() > 1e-3
    for task in range(2):
        torch.testing.assert_close(outputs(model, task, x), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    learn(model, 0, x)
    first = outputs(model, 0, x)
    assert first.isfinite().all() and not torch.allclose(first, expected)
    learn(model, 1, x)
    assert torch.equal(outputs(model, 0, x), first)
    assert not torch.equal(outputs(model, 1, x), first)
    verify_isolation(model)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_inputs_are_inferred_and_heads_resized(name):
    net = timm.create_model(name, num_classes=7)
    model = hatify(net, 3, num_classes=[2, 3, 5]).eval()
    (x,) = model.example_inputs
    assert x.shape[1:] == torch.Size(net.pretrained_cfg["input_size"])
    assert [outputs(model, task, x).shape[1] for task in range(3)] == [2, 3, 5]


@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax", ""])
def test_any_pooling_in_front_of_the_head_converts(pool):
    net = timm.create_model("test_resnet", num_classes=CLASSES if pool else 0, global_pool=pool)
    x = torch.randn(2, 3, 64, 64)
    model = hatify(net, 2, (x,), s_max=10.0)
    torch.testing.assert_close(outputs(model, 0, x), net.eval()(x), rtol=1e-5, atol=1e-6)
    model.begin_task(0)
    model.end_task()
    verify_isolation(model)


def test_features_of_several_stages_convert():
    net = timm.create_model("test_resnet", features_only=True)
    x = torch.randn(2, 3, 64, 64)
    model = hatify(net, 2, (x,), s_max=10.0)
    for actual, expected in zip(outputs(model, 0, x), net.eval()(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_drop_path_and_dropout_act_in_training_only():
    net = timm.create_model("test_vit", num_classes=CLASSES, drop_path_rate=0.5, drop_rate=0.3, attn_drop_rate=0.3)
    nn.init.normal_(net.head.weight)
    x = torch.randn(4, 3, 160, 160)
    model = hatify(net, 1, (x,))
    with torch.no_grad():
        assert torch.equal(outputs(model, 0, x), outputs(model, 0, x))
        model.begin_task(0)
        net.train()
        answers = []
        for each in (net, model):
            torch.manual_seed(0)
            answers.append(each(x))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(answers[0], net.eval()(x))
