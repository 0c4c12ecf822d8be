"""`mask_inputs=True`: a task chooses the input features it reads, and Equation 2 locks the columns that read them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from hatify import ConversionError, forget_task, hatify, load, save, verify_isolation

pytestmark = pytest.mark.filterwarnings("ignore:.*(no feature is left|every feature off):hatify.HatWarning")


class TokenMixer(nn.Module):
    """Tokens (N, T, 6), added to what a layer makes of them: the residual stream begins at the input."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head((tokens + self.mix(self.norm(tokens))).mean(1))


class TwoInputs(nn.Module):
    """Real features and indices: only the former can be masked."""

    def __init__(self):
        super().__init__()
        self.real, self.look_up, self.head = nn.Linear(5, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, features, index, gain=None):
        h = torch.relu(self.real(features) + self.look_up(index))
        return self.head(h if gain is None else h * gain)


class Divided(nn.Module):
    """An input that is divided by its own norm."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.fc(x / x.norm(dim=1, keepdim=True))))


class Modes(nn.Module):
    """A graph for each mode."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.relu(self.fc(x))
        return self.head(h * 2 if self.training else h)


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3))


def conv1d():
    return nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3))


def channels_last():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 3))


def normalised():
    return nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 16, 3))


NETS = {
    # name: (network, inputs, name of the masked input, its feature dimension)
    "mlp": (mlp, (torch.rand(5, 6),), "input", 1),
    "cnn": (cnn, (torch.rand(5, 4, 6, 6),), "input", 1),
    "conv1d": (conv1d, (torch.rand(5, 4, 7),), "input", 1),
    "channels last": (channels_last, (torch.rand(5, 4, 4, 5),), "input", 3),
    "normalised": (normalised, (torch.rand(5, 4, 4, 4),), "input", 1),
    "tokens": (TokenMixer, (torch.rand(5, 4, 6),), "tokens", 2),
    "two inputs": (TwoInputs, (torch.rand(5, 5), torch.tensor([0, 1, 2, 3, 4])), "features", 1),
    "divided": (Divided, (torch.rand(5, 6) + 0.1,), "x", 1),
    "modes": (Modes, (torch.rand(5, 6),), "x", 1),
}


@pytest.fixture(params=NETS)
def case(request):
    make, inputs, name, dim = NETS[request.param]
    net = make().eval()
    return net, hatify(net, 2, inputs, mask_inputs=True), inputs, name, dim


def learn(model, inputs, task, on):
    """Train on noise with every second feature (counted from `on`) of every mask off; AdamW with weight decay."""
    model.begin_task(task)
    embedding = model.task_state.embeddings[task]
    with torch.no_grad():
        embedding.copy_(torch.where(torch.arange(len(embedding)) % 2 == on, 3.0, -3.0))
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        loss = F.cross_entropy(model(*inputs), torch.arange(len(inputs[0])) % 3) + model.regularization()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.end_task()


@torch.no_grad()
def answer(model, inputs, task):
    with model.task(task):
        return model(*inputs)


def test_with_every_mask_on_it_computes_the_original(case):
    net, model, inputs, name, dim = case
    assert model.masks(0)[name].shape == (inputs[0].shape[dim],)
    assert torch.equal(model.eval()(*inputs), net(*inputs))


def test_finished_tasks_never_change(case):
    _, model, inputs, name, _ = case
    learn(model, inputs, 0, on=0)
    before = answer(model, inputs, 0)
    assert 0 < model.masks(0)[name].sum() < model.masks(0)[name].numel()
    verify_isolation(model)
    learn(model, inputs, 1, on=1)
    assert torch.equal(answer(model, inputs, 0), before)
    verify_isolation(model)


def test_a_task_does_not_read_features_that_are_off(case):
    _, model, inputs, name, dim = case
    learn(model, inputs, 0, on=0)
    off = (~model.masks(0)[name]).nonzero()[:, 0]
    changed = inputs[0].clone().index_copy_(dim, off, torch.rand_like(inputs[0].index_select(dim, off)) + 5)
    assert torch.equal(answer(model, (changed, *inputs[1:]), 0), answer(model, inputs, 0))
    assert not torch.equal(answer(model, (inputs[0] + 1, *inputs[1:]), 0), answer(model, inputs, 0))


def test_entries_are_locked_between_features_that_are_on():
    """Equation 2 on the first layer: o on and i on; the columns of inputs that are off stay free."""
    # Without activations, every gradient that is not locked is non-zero.
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model = hatify(net, 2, torch.rand(4, 6), mask_inputs=True)
    learn(model, (torch.rand(4, 6),), 0, on=0)
    read, written = model.masks(0)["input"], model.masks(0)["0"]
    weight = model.get_parameter("0.weight")
    before = weight.detach().clone()
    model.begin_task(1)
    model(torch.rand(4, 6)).square().sum().backward()
    locked = written[:, None] & read
    assert locked.any() and not locked.all()
    assert torch.equal(weight.grad == 0, locked)
    optim.SGD([weight], lr=0.1, weight_decay=0.1).step()
    assert torch.equal(weight == before, locked)


def test_gradients_of_an_input_mask_are_autograds_own_and_compensated():
    """Against y = W (a ⊙ x) + b written by hand; the gradient of e is Equation 3's, in its closed form."""
    x = torch.rand(7, 5, dtype=torch.float64)
    net = nn.Linear(5, 3).double()
    model = hatify(nn.Sequential(net), 1, x, heads=None, mask_inputs=True, mask_init="normal")
    model.begin_task(0)
    model.mask_scale = 3.0
    e = model.task_state.embeddings[0]
    (model(x).square().sum() + model.regularization(quota=False)).backward()

    gates = torch.sigmoid(3.0 * e.detach()).requires_grad_()
    weight, bias = net.weight.detach().clone().requires_grad_(), net.bias.detach().clone().requires_grad_()
    inputs, outputs = gates[:5], gates[5:]
    loss = (F.linear(x * inputs, weight, bias) * outputs).square().sum() + inputs.mean() + outputs.mean()
    loss.backward()
    compensated = gates.grad * model.s_max * torch.sigmoid(e.detach()) * torch.sigmoid(-e.detach())
    torch.testing.assert_close(e.grad, compensated)
    torch.testing.assert_close(model.get_parameter("0.weight").grad, weight.grad)
    torch.testing.assert_close(model.get_parameter("0.bias").grad, bias.grad)


def test_a_residual_stream_that_begins_at_the_input_shares_its_mask():
    model = hatify(TokenMixer(), 2, torch.rand(2, 4, 6), mask_inputs=True)
    with torch.no_grad():
        model.task_state.embeddings[0][:3] = -1.0
    assert model.masks(0)["tokens"].tolist() == [False] * 3 + [True] * 3
    assert torch.equal(model.masks(0)["tokens"], model.masks(0)["mix"])


def test_inputs_stay_unmasked_unless_asked_and_where_they_hold_no_features():
    inputs = NETS["two inputs"][1]
    assert set(hatify(TwoInputs(), 2, inputs).masks(0)) == {"real", "look_up"}
    gain = torch.tensor(2.0)
    assert set(hatify(TwoInputs(), 2, (*inputs, gain), mask_inputs=True).masks(0)) == {"features", "real", "look_up"}


def test_an_input_with_the_name_of_a_layer_is_refused():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.x, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.relu(self.x(x)))

    with pytest.raises(ConversionError, match="the input 'x' has the name of a layer"):
        hatify(Named(), 2, torch.rand(2, 4), mask_inputs=True)
    assert set(hatify(Named(), 2, torch.rand(2, 4)).masks(0)) == {"x"}


def test_an_input_whose_features_may_be_fewer_or_more_has_no_mask():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.head(torch.relu(self.first(F.adaptive_avg_pool1d(x, 4))))

    net = Pooled()
    model = hatify(net, 2, (torch.rand(2, 3, 8),), mask_inputs=True)
    assert set(model.masks(0)) == {"first"}
    for length in (5, 8, 12):
        x = torch.rand(2, 3, length)
        torch.testing.assert_close(model.eval()(x), net.eval()(x))


def test_input_masks_survive_saving_and_are_forgotten(tmp_path):
    inputs = (torch.rand(4, 6),)
    model = hatify(mlp(), 2, inputs, mask_inputs=True)
    learn(model, inputs, 0, on=0)
    learn(model, inputs, 1, on=1)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model", mlp())
    for task in (0, 1):
        assert torch.equal(again.masks(task)["input"], model.masks(task)["input"])
        assert torch.equal(answer(again, inputs, task), answer(model, inputs, task))
    forget_task(again, 0)
    assert again.masks(0)["input"].all()
    assert torch.equal(answer(again, inputs, 1), answer(model, inputs, 1))
