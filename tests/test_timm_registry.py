"""timm's own entry point with hatify's names: what goes in, what comes out, what is refused."""

import copy
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from torch import nn

import hatify.timm_models
from hatify import HatModel

SIZE = 64


@pytest.fixture
def weights():
    """A state dictionary of noise for test_resnet: unlike anything that initialisation yields, statistics included."""
    net = timm.create_model("test_resnet")
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}


def original(weights, name="test_resnet", **kwargs):
    net = timm.create_model(name, **kwargs)
    net.load_state_dict(weights)
    return net.eval()


def answers(model, x):
    """The outputs of every task."""
    model.eval()
    found = []
    with torch.no_grad():
        for task in range(model.num_tasks):
            with model.task(task):
                found.append(model(x))
    return found


def images(channels=3, size=SIZE):
    return torch.randn(2, channels, size, size)


# The list of names ---------------------------------------------------------------------------------------------------


def test_every_name_of_timm_has_a_counterpart():
    names = timm.list_models(exclude_filters="hat_*")
    assert len(names) > 1000
    assert set(timm.list_models("hat_*")) == {f"hat_{name}" for name in names}
    assert {f"hat_{name}" for name in timm.models.get_deprecated_models() if not name.startswith("hat_")} <= set(
        timm.models.get_deprecated_models()
    )


def test_pretrained_weights_are_listed_under_the_same_tags():
    tagged = timm.list_pretrained("resnet18")
    assert timm.list_pretrained("hat_resnet18") == [f"hat_{name}" for name in tagged]
    for name in ("resnet18", *tagged):
        theirs, ours = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(f"hat_{name}")
        assert (ours.hf_hub_id, ours.url, ours.tag, ours.input_size) == (
            theirs.hf_hub_id,
            theirs.url,
            theirs.tag,
            theirs.input_size,
        )


def test_importing_is_quick_and_creates_no_model():
    program = """
import time, torch, timm, hatify
made, init = [], torch.nn.Module.__init__
torch.nn.Module.__init__ = lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1]
start = time.process_time()
import hatify.timm_models
print(time.process_time() - start, len(made))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, made = run.stdout.split()
    assert int(made) == 0
    assert float(seconds) < 2.5  # about a tenth of this; timm's own import takes several seconds


def test_entry_points_are_attributes_of_the_module():
    model = hatify.timm_models.hat_test_resnet(num_tasks=1, num_classes=3)
    assert isinstance(model, HatModel)
    with pytest.raises(AttributeError, match="hat_no_such_model"):
        _ = hatify.timm_models.hat_no_such_model


def test_own_models_are_registered_on_demand():
    def test_of_my_own(pretrained=False, **kwargs):
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, kwargs["num_classes"]))

    timm.models.register_model(test_of_my_own)
    hatify.timm_models.register_all()
    model = timm.create_model(
        "hat_test_of_my_own", num_tasks=2, num_classes=[3, 5], example_inputs=(torch.randn(2, 3, 2, 2),)
    )
    assert [y.shape for y in answers(model, torch.randn(4, 3, 2, 2))] == [(4, 3), (4, 5)]
    assert timm.get_pretrained_cfg("hat_test_of_my_own") is None


# What goes to timm ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_pretrained_weights_reach_every_task(weights, tmp_path, kind):
    file = str(tmp_path / f"weights.{kind}")
    save_file(weights, file) if kind == "safetensors" else torch.save(weights, file)
    model = timm.create_model(
        "hat_test_resnet", num_tasks=3, pretrained=True, pretrained_cfg_overlay=dict(file=file), example_inputs=images()
    )
    x = images()
    expected = original(weights)(x)
    for found in answers(model, x):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("num_classes", [7, [7, 7], [7, 4]])
def test_another_number_of_classes_makes_fresh_heads(weights, tmp_path, num_classes):
    file = str(tmp_path / "weights.pth")
    torch.save(weights, file)
    model = timm.create_model(
        "hat_test_resnet",
        num_tasks=2,
        pretrained=True,
        pretrained_cfg_overlay=dict(file=file),
        num_classes=num_classes,
        example_inputs=images(),
    )
    per_task = num_classes if isinstance(num_classes, list) else [num_classes] * 2
    assert [y.shape[1] for y in answers(model, images())] == per_task
    assert model.num_classes == (7 if len(set(per_task)) == 1 else (7, 4))
    kept = {name: value for name, value in model.state_dict().items() if name in weights}
    assert "conv1.0.weight" in kept
    assert all(torch.equal(value, weights[name]) for name, value in kept.items())
    for task in range(2):
        model.set_task(task)
        head = model.get_classifier()
        assert head.weight.shape == (per_task[task], weights["fc.weight"].shape[1])
        assert head.weight.abs().max() < 0.5  # weights of the file are above that


def test_the_number_of_classes_of_the_weights_keeps_their_head(weights, tmp_path):
    file = str(tmp_path / "weights.pth")
    torch.save(weights, file)
    overlay = dict(file=file)
    classes = [weights["fc.bias"].numel()] * 2
    model = timm.create_model(
        "hat_test_resnet", num_tasks=2, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
    )
    for task in range(2):
        model.set_task(task)
        assert torch.equal(model.get_classifier().bias, weights["fc.bias"])


def test_a_checkpoint_path_is_a_checkpoint_of_the_original(weights, tmp_path):
    file = str(tmp_path / "checkpoint.pth")
    torch.save({"state_dict": weights}, file)
    model = timm.create_model("hat_test_resnet", num_tasks=2, checkpoint_path=file, example_inputs=images())
    x = images()
    expected = original(weights)(x)
    for found in answers(model, x):
        torch.testing.assert_close(found, expected)


def test_a_tag_chooses_the_configuration():
    model = timm.create_model("hat_vit_base_patch16_224.augreg_in21k", num_tasks=2, depth=1, embed_dim=24, num_heads=2)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"
    assert model.pretrained_cfg["architecture"] == "vit_base_patch16_224"
    assert model.num_classes == 21843
    with pytest.raises(RuntimeError, match="no_such_tag"):
        timm.create_model("hat_test_vit.no_such_tag", num_tasks=2)


def test_old_names_lead_to_the_new_ones():
    with pytest.warns(UserWarning, match="deprecated"):
        model = timm.create_model("hat_vit_tiny_patch16_224_in21k", num_tasks=1, depth=1, embed_dim=24, num_heads=2)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"


def test_arguments_reach_timm():
    model = timm.create_model(
        "hat_test_vit", num_tasks=2, img_size=96, in_chans=1, drop_path_rate=0.3, num_classes=5, exportable=True
    )
    assert model.example_inputs[0].shape == (2, 1, 96, 96)
    assert model.pretrained_cfg["num_classes"] == 1000
    rates = {m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)}
    assert max(rates) == pytest.approx(0.3)
    assert answers(model, images(1, 96))[1].shape == (2, 5)


def test_without_example_inputs_the_models_own_size_is_used():
    model = timm.create_model("hat_test_resnet", num_tasks=1)
    assert model.example_inputs[0].shape == (2, *model.pretrained_cfg["input_size"])


# What goes to the conversion -----------------------------------------------------------------------------------------


def test_arguments_reach_the_conversion():
    model = timm.create_model(
        "hat_test_resnet",
        num_tasks=4,
        mask_init=-0.5,
        s_max=100.0,
        couple=False,
        heads="fc",
        policies={"conv1.0": "per_task"},
        example_inputs=images(),
    )
    assert model.num_tasks == 4
    assert model.s_max == 100.0
    assert torch.equal(model.task_state.embeddings[3], torch.full_like(model.task_state.embeddings[3], -0.5))
    policies = {entry.name: str(entry.policy) for entry in model.census}
    assert policies["conv1.0.weight"] == "per_task" and policies["fc.weight"] == "head"
    coupled = timm.create_model("hat_test_resnet", num_tasks=1, example_inputs=images())
    assert model.task_state.num_slots > coupled.task_state.num_slots
    assert model.example_inputs[0].shape == images().shape


def test_no_heads_are_asked_for_by_an_empty_list():
    model = timm.create_model("hat_test_resnet", num_tasks=1, heads=[], example_inputs=images())
    assert {str(entry.policy) for entry in model.census if entry.name == "fc.weight"} == {"shared"}
    assert isinstance(model.get_classifier(), nn.Linear)


@pytest.mark.parametrize(
    ("name", "kwargs", "error", "message"),
    [
        ("hat_test_resnet", {}, TypeError, r"num_tasks is missing: timm.create_model\('hat_test_resnet'"),
        ("hat_no_such_model", {"num_tasks": 2}, RuntimeError, "Unknown model.*hat_no_such_model"),
        ("hat_test_resnet", {"num_tasks": 0}, ValueError, "num_tasks"),
        ("hat_test_resnet", {"num_tasks": 3, "num_classes": [5, 5]}, ValueError, "an integer or 3 of them"),
        ("hat_test_resnet", {"num_tasks": 2, "num_classes": [5, 0]}, ValueError, "num_classes"),
        ("hat_test_resnet", {"num_tasks": 2, "policies": {"nowhere": "row"}}, hatify.ConversionError, "nowhere"),
        ("hat_test_resnet", {"num_tasks": 2, "no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_errors(name, kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model(name, **kwargs)


# timm's interface ----------------------------------------------------------------------------------------------------


def copies(model):
    return {"itself": model, "deep copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}


def test_the_model_is_described_as_timm_describes_it():
    net = timm.create_model("test_vit", img_size=SIZE)
    model = timm.create_model("hat_test_vit", num_tasks=2, img_size=SIZE)
    for found in copies(model).values():
        assert found.pretrained_cfg == found.default_cfg == net.pretrained_cfg
        assert (found.num_classes, found.num_features) == (net.num_classes, net.num_features)
        assert resolve_model_data_config(found) == resolve_model_data_config(net)


def test_the_classifier_is_that_of_the_task_that_is_set():
    model = timm.create_model("hat_test_resnet", num_tasks=3, num_classes=[4, 3, 2], example_inputs=images())
    for found in copies(model).values():
        for task, classes in ((2, 2), (0, 4), (1, 3)):
            found.set_task(task)
            assert found.get_classifier() is found.fc[task]
            assert found.get_classifier().out_features == classes
    assert model.task_state.task == 1


def test_several_classifiers_stay_a_tuple():
    net_arguments = dict(img_size=32, depth=1, embed_dim=24, num_heads=2, num_classes=3)
    model = timm.create_model("hat_deit_tiny_distilled_patch16_224", num_tasks=2, **net_arguments)
    model.set_task(1)
    assert model.get_classifier() == (model.head[1], model.head_dist[1])


def test_a_model_without_classes_has_no_layer_for_them():
    model = timm.create_model("hat_test_resnet", num_tasks=1, num_classes=0, example_inputs=images())
    assert model.num_classes == 0
    assert isinstance(model.get_classifier(), nn.Identity)
    assert answers(model, images())[0].shape == (2, model.num_features)


# Weights of the original ---------------------------------------------------------------------------------------------


def test_weights_of_the_original_can_be_loaded_later(weights):
    model = timm.create_model("hat_test_resnet", num_tasks=2, example_inputs=images())
    x = images()
    for found in copies(model).values():
        assert not found.load_state_dict(weights).missing_keys
        for answer in answers(found, x):
            torch.testing.assert_close(answer, original(weights)(x))


def test_raw_parameters_of_each_task_are_loaded_too():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))
            self.fc1, self.fc2 = nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc2(torch.relu(self.fc1(x.flatten(1)) * self.scale))

    net = Scaled()
    model = hatify.hatify(net, 2, (torch.randn(2, 12),))
    hatify.timm_models.keep_interface(model)
    other = Scaled().requires_grad_(False)
    other.scale.fill_(5.0)
    model.load_state_dict(other.state_dict())
    x = torch.randn(4, 12)
    for answer in answers(model, x):
        torch.testing.assert_close(answer, other(x))


def test_state_dictionaries_of_converted_models_still_load(weights):
    first, second = (timm.create_model("hat_test_resnet", num_tasks=2, example_inputs=images()) for _ in range(2))
    first.load_state_dict(weights)
    second.load_state_dict(first.state_dict())
    x = images()
    for a, b in zip(answers(first, x), answers(second, x), strict=True):
        assert torch.equal(a, b)


def test_weights_that_do_not_fit_are_refused(weights):
    model = timm.create_model("hat_test_resnet", num_tasks=2, example_inputs=images())
    with pytest.raises(RuntimeError, match=r"Missing key.*fc\.0\.weight"):
        model.load_state_dict({k: v for k, v in weights.items() if k != "fc.weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        model.load_state_dict({**weights, "surplus.weight": torch.zeros(1)})
    other = timm.create_model("hat_test_resnet", num_tasks=2, num_classes=3, example_inputs=images())
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.0\.weight"):
        other.load_state_dict(weights)


@pytest.mark.filterwarnings("ignore::hatify.HatWarning")
def test_weights_of_the_original_say_nothing_of_tasks_that_were_learned(weights):
    model = timm.create_model("hat_test_resnet", num_tasks=2, example_inputs=images())
    model.begin_task(0)
    model.end_task()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(hatify.TaskError, match=r"tasks 0 have learned .* hatify\.load_plain_state_dict"):
            model.load_state_dict(weights, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
