"""How well tasks are learned: by README's loop, and by what one would do otherwise.

Each setting is a sequence of tasks, a network and an optimizer. Methods, all with the same images, epochs, batches and
optimizer: a converted network by README's loop; a network for each task (``separate``); one network for all tasks at
once (``joint``); one network that is trained on and on (``fine_tuning``); and from pretrained weights a quarter more
features beside the base (``spare``), the features frozen under new heads (``frozen``), and one LoRA adapter for each
task (``lora``, where peft is installed).

Results are kept in a JSON file, one cell for each setting, method, seed and split, written after every cell: what is
there is not measured again, so an interrupted run goes on, and several processes may share a file. Choose settings by
``--split validation``: of CIFAR-10 the first fifth of the test images of each class, since public checkpoints have been
trained on all of its training images, of Omniglot two drawings of each character that are not trained on then. Other
test images are for the figures that are reported.

    python benchmarks/learning.py --data DIR --settings resnet18_adamw --methods hatify separate --seeds 0 1 2
    python benchmarks/learning.py --summary
"""

from __future__ import annotations

import argparse
import copy
import fcntl
import json
import statistics
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import cifar10
import hatify
import resnet_cifar
from split_cifar10 import conditions

RESULTS = Path(__file__).parent / "results" / "learning.json"
#: The share of the test images of each class by which settings are chosen.
HELD_OUT = 0.2
BATCH = 50


@dataclass(frozen=True)
class Task:
    """Images as the network takes them, but for augmentation, and labels from 0 on."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


@dataclass(frozen=True)
class Setting:
    """A sequence of tasks, a network and how it is trained.

    Attributes:
        tasks: makes them, given the options, the split and the seed.
        network: makes the network, given the options; its output layer is named `head`.
        optimizer: makes an optimizer of the parameters it is given.
        epochs: for each task.
        head: the name of the output layer.
        pretrained: whether the network has learned something.
        prepare: what is done to a batch of training images, given a generator of random numbers.
    """

    tasks: Callable[[argparse.Namespace, str, int], list[Task]]
    network: Callable[[argparse.Namespace], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    epochs: int
    head: str
    pretrained: bool = False
    prepare: Callable[[Tensor, torch.Generator], Tensor] = field(default=lambda images, generator: images)


# Data ----------------------------------------------------------------------------------------------------------------


@cache
def _cifar10(data: Path | None) -> cifar10.Cifar10:
    return cifar10.load(data)


def cifar_tasks(groups: list[tuple[int, ...]], images: int) -> Callable[[argparse.Namespace, str, int], list[Task]]:
    """Tasks of the given classes of CIFAR-10, with so many training images of each."""

    def tasks(args: argparse.Namespace, split: str, seed: int) -> list[Task]:
        data, made = _cifar10(args.data), []
        for classes in groups:
            generator = torch.Generator().manual_seed(seed)
            train, test = [], []
            for label in classes:
                rows = (data.train_labels == label).nonzero()[:, 0]
                train.append(rows[torch.randperm(len(rows), generator=generator)[:images]])
                rows = (data.test_labels == label).nonzero()[:, 0]
                first = round(HELD_OUT * len(rows))
                test.append(rows[:first] if split == "validation" else rows[first:])
            x, y = _chosen(data.test_images, test)
            made.append(Task(_chosen(data.train_images, train), (cifar10.normalise(x), y), len(classes)))
        return made

    return tasks


def _chosen(images: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat([images[r] for r in rows]), torch.cat([torch.full((len(r),), i) for i, r in enumerate(rows)])


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """CIFAR-10's usual augmentation, and normalisation."""
    return cifar10.normalise(cifar10.augment(images, generator))


PAIRS = [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]

#: Drawings of each character by different people; the last of those that are not for testing are held out.
DRAWINGS, TRAINING, VALIDATION = 20, 14, 2
EDGE = 28


@cache
def _omniglot(data: Path) -> dict[str, list[Tensor]]:
    """{alphabet: images of each character, uint8 (drawings, 1, EDGE, EDGE), black on white inverted}."""
    found: dict[str, dict[str, list[np.ndarray]]] = {}
    for archive in sorted(data.glob("omniglot-small*.zip")):
        with zipfile.ZipFile(archive) as file:
            for name in sorted(n for n in file.namelist() if n.endswith(".png")):
                _, alphabet, character, drawing = name.split("/")
                image = Image.open(BytesIO(file.read(name))).convert("L").resize((EDGE, EDGE), Image.Resampling.BOX)
                found.setdefault(alphabet, {}).setdefault(character, []).append((drawing, 255 - np.asarray(image)))
    if not found:
        raise cifar10.DataError(f"{data}: no omniglot-small*.zip in it")
    return {
        alphabet: [
            torch.from_numpy(np.stack([image for _, image in sorted(dict(drawings).items())]))[:, None]
            for drawings in characters.values()
        ]
        for alphabet, characters in found.items()
    }


def omniglot_tasks(args: argparse.Namespace, split: str, seed: int) -> list[Task]:
    """One alphabet after the other."""
    if args.data is None:
        raise cifar10.DataError("Omniglot is read from files: name their folder by --data")
    made = []
    for characters in _omniglot(args.data).values():
        last = TRAINING - VALIDATION if split == "validation" else TRAINING
        end = TRAINING if split == "validation" else DRAWINGS
        pieces = [(c[:last].float() / 255, c[last:end].float() / 255) for c in characters]
        parts = (
            (torch.cat([p[i] for p in pieces]), torch.cat([torch.full((len(p[i]),), n) for n, p in enumerate(pieces)]))
            for i in (0, 1)
        )
        made.append(Task(*parts, len(characters)))
    return made


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels."""
    count, _, height, width = images.shape
    rows, columns = (torch.randint(5, (count, 1), generator=generator) + torch.arange(size) for size in (height, width))
    padded = F.pad(images, (2,) * 4)[:, 0]
    return padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None]


# Networks ------------------------------------------------------------------------------------------------------------


def resnet18(args: argparse.Namespace) -> nn.Module:
    """timm's, with a stem of 3 × 3 for small images; of 8 × 8 positions behind it."""
    net = timm.create_model("resnet18", num_classes=2)
    net.conv1 = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    return net


def checkpoint(name: str) -> Callable[[argparse.Namespace], nn.Module]:
    """One of `resnet_cifar`'s, with the public weights for all ten classes."""

    def make(args: argparse.Namespace) -> nn.Module:
        net = getattr(resnet_cifar, name)()
        if args.data is None or not (found := sorted(args.data.glob(f"checkpoints/{name}-*.th"))):
            raise cifar10.DataError(f"{args.data}: no checkpoints/{name}-*.th in it")
        net.load_state_dict(resnet_cifar.read_checkpoint(found[0]))
        return net

    return make


def narrow(args: argparse.Namespace) -> nn.Module:
    """A ResNet-20 of 16, 32 and 64 features."""
    return resnet_cifar.resnet20()


def small_convolutional(args: argparse.Namespace) -> nn.Module:
    """Four convolutions with batch norms, for drawings of EDGE × EDGE."""
    layers: list[nn.Module] = []
    for inputs in (1, 64, 64, 64):
        layers += [nn.Conv2d(inputs, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2))


def vit(args: argparse.Namespace) -> nn.Module:
    """A vision transformer of six blocks of 128 features on 8 × 8 patches."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=128, depth=6, num_heads=4, num_classes=2
    )


def pretrained_on(
    make: Callable[[argparse.Namespace], nn.Module], classes: tuple[int, ...], head: str, epochs: int
) -> Callable[[argparse.Namespace], nn.Module]:
    """`make`'s network, trained on all training images of these classes of CIFAR-10: once, and kept in a file."""

    def network(args: argparse.Namespace) -> nn.Module:
        net = make(args)
        inputs = net.get_submodule(head).in_features
        net.set_submodule(head, nn.Linear(inputs, len(classes)))  # type: ignore[arg-type]
        kept = args.cache / f"{make.__name__}_{''.join(map(str, classes))}_{epochs}.pt"
        if not kept.exists():
            (task,) = cifar_tasks([classes], 5000)(args, "test", 0)
            setting = Setting(cifar_tasks([classes], 5000), make, adamw(1e-3), epochs, head, prepare=augmented)
            torch.manual_seed(0)
            Trainer(setting, 0).train(net.train(), torch.optim.AdamW(net.parameters(), lr=2e-3), task.train)
            args.cache.mkdir(parents=True, exist_ok=True)
            torch.save(net.state_dict(), kept)
        net.load_state_dict(torch.load(kept, weights_only=True))
        return net

    return network


#: Five classes to learn from beforehand, and tasks of the other five.
BEFORE, OTHERS = (0, 1, 2, 3, 4), [(5, 6), (7, 8), (9, 5), (6, 8)]


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """With momentum."""
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    """With the usual weight decay."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr)


SETTINGS = {
    "resnet18_adamw": Setting(cifar_tasks(PAIRS, 2000), resnet18, adamw(1e-3), 6, "fc", prepare=augmented),
    "resnet18_sgd": Setting(cifar_tasks(PAIRS, 2000), resnet18, sgd(0.05), 6, "fc", prepare=augmented),
    "resnet20_adamw": Setting(
        cifar_tasks(PAIRS, 500), checkpoint("resnet20"), adamw(1e-3), 4, "linear", True, augmented
    ),
    "resnet20_sgd": Setting(cifar_tasks(PAIRS, 500), checkpoint("resnet20"), sgd(0.02), 4, "linear", True, augmented),
    "resnet56_adamw": Setting(
        cifar_tasks(PAIRS, 500), checkpoint("resnet56"), adamw(1e-3), 4, "linear", True, augmented
    ),
    "vit_adamw": Setting(cifar_tasks(PAIRS, 2000), vit, adamw(1e-3), 6, "head", prepare=augmented),
    "omniglot_adamw": Setting(omniglot_tasks, small_convolutional, adamw(1e-3), 30, "17", prepare=shifted),
    **{
        f"transfer_{images}": Setting(
            cifar_tasks(OTHERS, images),
            pretrained_on(narrow, BEFORE, "linear", 10),
            adamw(1e-3),
            epochs,
            "linear",
            True,
            augmented,
        )
        for images, epochs in ((50, 40), (200, 10), (5000, 2))
    },
    "vit_transfer": Setting(
        cifar_tasks(OTHERS, 2000), pretrained_on(vit, BEFORE, "head", 10), adamw(1e-3), 6, "head", True, augmented
    ),
    "narrow_20_tasks": Setting(cifar_tasks(PAIRS * 4, 500), narrow, adamw(1e-3), 6, "linear", prepare=augmented),
}

# Methods -------------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a method reached.

    Attributes:
        accuracy: of each task, once all have been learned.
        parameters: how many numbers have to be stored to answer all tasks.
        step: median seconds of a training step.
        answer: seconds to answer one image, in batches of `BATCH`.
        used: the share of the features that tasks use, after each; of a converted network.
    """

    accuracy: list[float]
    parameters: int
    step: float
    answer: float
    used: list[float] | None = None


class Trainer:
    """Trains and asks networks by one setting, and takes the time."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.generator = torch.Generator().manual_seed(seed)
        self.steps: list[float] = []

    def train(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: tuple[Tensor, Tensor],
        among: Callable[[Tensor, Tensor], Tensor] = lambda logits, rows: logits,
    ) -> None:
        """README's loop, with a rate that falls to zero along a cosine.

        `among` makes of logits those that the samples of these rows choose among.
        """
        images, labels = data
        batch = min(BATCH, len(labels))
        steps = len(labels) // batch
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.setting.epochs * steps)
        for _ in range(self.setting.epochs):
            for rows in torch.randperm(len(labels), generator=self.generator)[: steps * batch].split(batch):
                x = self.setting.prepare(images[rows], self.generator)
                begun = time.perf_counter()
                loss = F.cross_entropy(among(net(x), rows), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                self.steps.append(time.perf_counter() - begun)
                rate.step()

    @torch.no_grad()
    def accuracy(self, net: Callable[[Tensor], Tensor], data: tuple[Tensor, Tensor]) -> float:
        """Of a network in evaluation mode."""
        right = sum((net(x).argmax(1) == y).sum().item() for x, y in zip(*(d.split(500) for d in data), strict=True))
        return right / len(data[1])

    @torch.no_grad()
    def seconds_to_answer(self, net: nn.Module, images: Tensor) -> float:
        """For one image."""
        times = []
        for batch in images[: 20 * BATCH].split(BATCH):
            begun = time.perf_counter()
            net(batch)
            times.append((time.perf_counter() - begun) / len(batch))
        return statistics.median(times)

    def network(self, args: argparse.Namespace, classes: int) -> nn.Module:
        """The setting's network with a new head."""
        net = self.setting.network(args)
        old = net.get_submodule(self.setting.head)
        net.set_submodule(self.setting.head, nn.Linear(old.in_features, classes))  # type: ignore[union-attr]
        return net


def size(*tensors: Iterator[Tensor]) -> int:
    """How many numbers there are, each tensor counted once."""
    return sum({id(t): t.numel() for of in tensors for t in of}.values())


def by_hatify(trainer: Trainer, tasks: list[Task], args: argparse.Namespace, spare: float = 0.0) -> Outcome:
    """README's loop."""
    setting = trainer.setting
    model = hatify.hatify(
        setting.network(args),
        num_tasks=len(tasks),
        example_inputs=tasks[0].test[0][:2],
        num_classes=[task.classes for task in tasks],
        base="locked" if setting.pretrained else None,
        spare=spare,
    )
    answers, used = [], []
    for t, task in enumerate(tasks):
        model.begin_task(t)
        trainer.train(model, setting.optimizer(model.parameters()), task.train)
        model.end_task()
        with torch.no_grad():
            answers.append(model(task.test[0][:500]))
        used.append(model.task_state.used().float().mean().item())
    accuracy = []
    for t, task in enumerate(tasks):
        with model.task(t), torch.no_grad():
            if not torch.equal(model(task.test[0][:500]), answers[t]):
                raise SystemExit(f"task {t} does not answer as on the day it ended")
            accuracy.append(trainer.accuracy(model, task.test))
    stored = size(model.parameters(), model.buffers()) - size(model.task_state.parameters())
    return Outcome(accuracy, stored, *_times(trainer, model, tasks), used)


def separate(trainer: Trainer, tasks: list[Task], args: argparse.Namespace) -> Outcome:
    """A network for each task."""
    accuracy, stored = [], 0
    for task in tasks:
        net = trainer.network(args, task.classes).train()
        trainer.train(net, trainer.setting.optimizer(net.parameters()), task.train)
        accuracy.append(trainer.accuracy(net.eval(), task.test))
        stored += size(net.parameters(), net.buffers())
    return Outcome(accuracy, stored, *_times(trainer, net, tasks))


def frozen(trainer: Trainer, tasks: list[Task], args: argparse.Namespace) -> Outcome:
    """The features as they are, and a new head for each task."""
    accuracy, stored = [], 0
    for i, task in enumerate(tasks):
        net = trainer.network(args, task.classes).eval().requires_grad_(False)
        head = net.get_submodule(trainer.setting.head).requires_grad_()
        trainer.train(net, trainer.setting.optimizer(head.parameters()), task.train)
        accuracy.append(trainer.accuracy(net, task.test))
        stored += size(head.parameters()) if i else size(net.parameters(), net.buffers())
    return Outcome(accuracy, stored, *_times(trainer, net, tasks))


def lora(trainer: Trainer, tasks: list[Task], args: argparse.Namespace) -> Outcome:
    """One adapter of rank 8 on every layer for each task, and a new head."""
    import peft

    accuracy, stored = [], 0
    for i, task in enumerate(tasks):
        plain = trainer.network(args, task.classes)
        layers = [n for n, m in plain.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        head = trainer.setting.head
        config = peft.LoraConfig(
            r=8, lora_alpha=16, target_modules=[n for n in layers if n != head], modules_to_save=[head]
        )
        net = peft.get_peft_model(plain, config).train()
        learned = [p for p in net.parameters() if p.requires_grad]
        trainer.train(net, trainer.setting.optimizer(learned), task.train)
        accuracy.append(trainer.accuracy(net.eval(), task.test))
        stored += size(iter(learned), net.buffers()) if i else size(net.parameters(), net.buffers())
    return Outcome(accuracy, stored, *_times(trainer, net, tasks))


class OfEachSample(nn.Module):
    """A network whose output layer is for all tasks: each batch is of one."""

    def __init__(self, net: nn.Module, first: int, count: int) -> None:
        super().__init__()
        self.net, self.first, self.count = net, first, count

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, self.first : self.first + self.count]


def joint(trainer: Trainer, tasks: list[Task], args: argparse.Namespace) -> Outcome:
    """One network for all tasks, all images in each epoch; each sample chooses among the classes of its task."""
    firsts = np.cumsum([0, *(task.classes for task in tasks)])
    net = trainer.network(args, int(firsts[-1])).train()
    of_task = torch.cat([torch.full((len(task.train[1]),), t) for t, task in enumerate(tasks)])
    images = torch.cat([task.train[0] for task in tasks])
    labels = torch.cat([task.train[1] + int(first) for task, first in zip(tasks, firsts[:-1], strict=True)])
    task_of_class = torch.cat([torch.full((task.classes,), t) for t, task in enumerate(tasks)])

    def of_its_task(logits: Tensor, rows: Tensor) -> Tensor:
        return logits.masked_fill(task_of_class != of_task[rows][:, None], -torch.inf)

    trainer.train(net, trainer.setting.optimizer(net.parameters()), (images, labels), of_its_task)
    net.eval()
    accuracy = [
        trainer.accuracy(OfEachSample(net, int(first), task.classes), task.test)
        for task, first in zip(tasks, firsts[:-1], strict=True)
    ]
    return Outcome(accuracy, size(net.parameters(), net.buffers()), *_times(trainer, net, tasks))


def fine_tuning(trainer: Trainer, tasks: list[Task], args: argparse.Namespace) -> Outcome:
    """One network that learns task after task with a new head for each, and is asked in the end."""
    net, heads = trainer.network(args, tasks[0].classes), []
    for task in tasks:
        head = nn.Linear(net.get_submodule(trainer.setting.head).in_features, task.classes)  # type: ignore[arg-type]
        net.set_submodule(trainer.setting.head, head)
        trainer.train(net.train(), trainer.setting.optimizer(net.parameters()), task.train)
        heads.append(copy.deepcopy(head))
    net.eval()
    accuracy = []
    for task, head in zip(tasks, heads, strict=True):
        net.set_submodule(trainer.setting.head, head)
        accuracy.append(trainer.accuracy(net, task.test))
    stored = size(net.parameters(), net.buffers()) + size(*(head.parameters() for head in heads[:-1]))
    return Outcome(accuracy, stored, *_times(trainer, net, tasks))


def _times(trainer: Trainer, net: nn.Module, tasks: list[Task]) -> tuple[float, float]:
    return statistics.median(trainer.steps), trainer.seconds_to_answer(net, tasks[-1].test[0])


METHODS: dict[str, Callable[[Trainer, list[Task], argparse.Namespace], Outcome]] = {
    "hatify": by_hatify,
    "separate": separate,
    "joint": joint,
    "fine_tuning": fine_tuning,
    "spare": partial(by_hatify, spare=0.25),
    "frozen": frozen,
    "lora": lora,
}
OF_PRETRAINED = ("spare", "frozen", "lora")

# Running -------------------------------------------------------------------------------------------------------------


@contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Let one process at a time read and write the results."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with (output.parent / f".{output.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _few(task: Task) -> Task:
    rows = torch.randperm(len(task.train[1]))[: 2 * BATCH]
    return Task((task.train[0][rows], task.train[1][rows]), (task.test[0][:BATCH], task.test[1][:BATCH]), task.classes)


def read(output: Path) -> dict[str, Any]:
    """The results there are."""
    return json.loads(output.read_text()) if output.exists() else {"conditions": {}, "cells": []}


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What a cell is the result of."""
    return tuple(cell[name] for name in ("setting", "method", "seed", "split"))


def run(args: argparse.Namespace, console: Console) -> None:
    """Measure every cell that is asked for and not there."""
    begun = time.perf_counter()
    for name in args.settings:
        setting = SETTINGS[name]
        for seed in args.seeds:
            for method in args.methods:
                if method in OF_PRETRAINED and not setting.pretrained:
                    continue
                wanted = {"setting": name, "method": method, "seed": seed, "split": args.split}
                if key(wanted) in map(key, read(args.output)["cells"]):
                    continue
                if time.perf_counter() - begun > args.time_budget:
                    return
                torch.manual_seed(seed)
                tasks = setting.tasks(args, args.split, seed)
                if args.fast:
                    setting, tasks = replace(setting, epochs=1), [_few(task) for task in tasks[:2]]
                outcome = METHODS[method](Trainer(setting, seed), tasks, args)
                mean = statistics.mean(outcome.accuracy)
                console.print(f"{name}, {method}, seed {seed}: {100 * mean:.2f} %")
                with _alone(args.output):
                    results = read(args.output)
                    source = _cifar10(args.data).source if "omniglot" not in name else "Omniglot"
                    results["conditions"] |= conditions(torch.device("cpu"), source) | {"fast": args.fast}
                    results["cells"] = [c for c in results["cells"] if key(c) != key(wanted)]
                    results["cells"].append(wanted | {"mean": mean} | vars(outcome))
                    results["cells"].sort(key=lambda cell: [str(part) for part in key(cell)])
                    args.output.write_text(json.dumps(results, indent=1) + "\n")


def summary(output: Path, split: str) -> Table:
    """Mean accuracy over seeds, and what it costs, beside a network for each task."""
    table = Table("setting", "method", "accuracy, %", "seeds", "stored", "step", "used", "first, last task")
    cells = [cell for cell in read(output)["cells"] if cell["split"] == split]
    for name in dict.fromkeys(cell["setting"] for cell in cells):
        of = {
            method: [c for c in cells if (c["setting"], c["method"]) == (name, method)]
            for method in dict.fromkeys(c["method"] for c in cells if c["setting"] == name)
        }
        for method, found in of.items():
            means = [100 * cell["mean"] for cell in found]
            spread = f" ± {statistics.stdev(means):.2f}" if len(means) > 1 else ""
            alone = of.get("separate", found)
            ends = [statistics.mean(100 * cell["accuracy"][i] for cell in found) for i in (0, -1)]
            table.add_row(
                name,
                method,
                f"{statistics.mean(means):.2f}{spread}",
                str(len(found)),
                f"{found[0]['parameters'] * len(found[0]['accuracy']) / max(1, alone[0]['parameters']):.2f}",
                f"{found[0]['step'] / alone[0]['step']:.2f}",
                f"{100 * found[0]['used'][-1]:.0f} %" if found[0]["used"] else "",
                f"{ends[0]:.1f}, {ends[1]:.1f}",
            )
    return table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10, Omniglot and checkpoints; see cifar10.py")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="(%(default)s)")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="begin no cell after so many seconds")
    parser.add_argument("--threads", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="(%(default)s)")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "hatify-benchmarks",
        help="folder for what is trained beforehand (%(default)s)",
    )
    parser.add_argument("--fast", action="store_true", help="two tasks, few images, one epoch: shows that it runs")
    parser.add_argument("--summary", action="store_true", help="only print what there is")
    return parser.parse_args()


def main() -> int:
    args, console = parse(), Console()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("always", hatify.HatWarning)
    if not args.summary:
        try:
            run(args, console)
        except cifar10.DataError as error:
            print(error, file=sys.stderr)
            return 2
    console.print(summary(args.output, args.split))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
