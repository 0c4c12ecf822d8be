"""Every timm model as a network of tasks: ``timm.create_model("hat_resnet18", num_tasks=5)``.

Importing this module registers ``hat_<name>`` with timm for each name that timm knows; no model is created before it is
asked for::

    import timm, hatify.timm_models

    model = timm.create_model("hat_resnet50.a1_in1k", num_tasks=3, pretrained=True, num_classes=[10, 5, 2])
    timm.list_models("hat_*")
    timm.data.resolve_model_data_config(model)

The arguments of `hatify.hatify` (``num_tasks``, which is required, ``example_inputs``, ``heads``, ``mask_init``,
``couple``, ``s_max``, ``policies``, ``clamp``, ``mask_inputs``, ``base``, ``spare``) go to the conversion, all others
to timm; ``num_classes`` is one number or one for each task. ``timm.create_model`` drops arguments that are None, so
``heads=[]`` asks for no heads. With ``pretrained=True`` the network is a locked base; ``base="none"`` asks for none.

Weights are loaded into timm's own network, which is converted then: they land on the shared layers and on the copy of
every task. With another number of classes than the weights have, the heads start afresh, as in timm. The converted
model keeps timm's attributes (``pretrained_cfg``, ``num_features``, …; ``num_classes`` is a tuple where tasks differ in
it) and methods (`hatify.timm_methods`), and takes state dictionaries of the original, which is how
``checkpoint_path`` works.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable
from typing import Any

from timm.models import (
    DefaultCfg,
    get_arch_pretrained_cfgs,
    get_deprecated_models,
    is_model,
    list_models,
    model_entrypoint,
    register_model,
    register_model_deprecations,
)

from hatify.convert import hatify
from hatify.model import HatModel
from hatify.nn.state import STATE
from hatify.weights import OriginalWeights

PREFIX = "hat_"

#: Keywords that go to `hatify.hatify`; ``num_classes`` concerns both sides.
OPTIONS = tuple(name for name in inspect.signature(hatify).parameters if name not in ("net", "num_classes"))


class EntryPoint:
    """Creates a timm model and converts it; registered under ``hat_<name>``.

    Args:
        name: timm's name of the model, without a tag.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        # What timm's registry reads of a function.
        self.__name__ = self.__qualname__ = PREFIX + name
        self.__module__ = __name__
        self.__doc__ = f"timm's ``{name}``, converted by `hatify.hatify`; see `hatify.timm_models`."

    def __call__(self, pretrained: bool = False, **kwargs: Any) -> HatModel:
        """The converted model.

        Args:
            pretrained: load timm's weights before the conversion.
            kwargs: arguments of `hatify.hatify` and of timm's entry point.

        Raises:
            TypeError: ``num_tasks`` is missing.
            ValueError: an argument is out of range.
            ConversionError: the model cannot be converted.
        """
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        base = options.pop("base", "locked" if pretrained and not options.get("mask_inputs") else "none")
        if "num_tasks" not in options:
            raise TypeError(f"num_tasks is missing: timm.create_model({self.__name__!r}, num_tasks=…)")
        per_task = _one_per_task(kwargs, options["num_tasks"])
        net = model_entrypoint(self.name)(pretrained=pretrained, **kwargs)
        # As timm.create_model does it: what the network can be made of again.
        net._model_args = {**getattr(net, "_model_args", {}), **kwargs}
        model = hatify(net, num_classes=per_task, base=None if base == "none" else base, **options)
        keep_interface(model)
        return model

    def __repr__(self) -> str:
        return f"<entry point of {self.__name__}>"


def _one_per_task(kwargs: dict[str, Any], num_tasks: int) -> tuple[int, ...] | None:
    """The numbers of classes where tasks differ in it, else None; `kwargs` keeps the one that timm's network gets."""
    if not isinstance(kwargs.get("num_classes"), Iterable):
        return None
    per_task = tuple(kwargs["num_classes"])
    if len(per_task) != num_tasks:
        raise ValueError(f"num_classes must be an integer or {num_tasks} of them, not {per_task}")
    kwargs["num_classes"] = per_task[0]
    return per_task if len(set(per_task)) > 1 else None


# timm's interface ----------------------------------------------------------------------------------------------------


def keep_interface(model: HatModel) -> None:
    """Give a converted model what timm's own code expects of the network it was made from.

    Attributes are there already, but for ``num_classes`` where tasks differ in it, and so are the methods of
    `hatify.timm_methods`. This lets the model load state dictionaries of the original.
    """
    classes = model.origin.arguments["num_classes"]
    if isinstance(classes, list):
        model.num_classes = tuple(classes)
    model._register_load_state_dict_pre_hook(OriginalWeights.of(model))
    model.register_load_state_dict_post_hook(_state_may_be_missing)


def _state_may_be_missing(model: HatModel, incompatible: Any) -> None:
    """The original's weights say nothing of tasks: before the first task has begun, nothing need be said."""
    if model.finished_tasks or model.active_task is not None:
        return
    missing = incompatible.missing_keys
    state = [key for key in missing if STATE in key.split(".")]
    if len(state) == len(model.task_state.state_dict()):
        missing[:] = [key for key in missing if key not in state]


# The registry --------------------------------------------------------------------------------------------------------

#: Where `register_model` looks for the pretrained weights that a name has: those of the original.
default_cfgs: dict[str, DefaultCfg] = {}


def register_all() -> None:
    """Register ``hat_<name>`` for every name of timm's that has none yet.

    Importing this module calls it; call it again after registering models of your own with timm.
    """
    for name in list_models():
        if not name.startswith(PREFIX) and not is_model(PREFIX + name):
            if weights := get_arch_pretrained_cfgs(name):
                default_cfgs[PREFIX + name] = _by_tag(weights.values())
            register_model(EntryPoint(name))
    register_model_deprecations(
        __name__,
        {
            PREFIX + old: new and PREFIX + new
            for old, new in get_deprecated_models().items()
            if not old.startswith(PREFIX) and not is_model(PREFIX + old)
        },
    )


def _by_tag(weights: Iterable[Any]) -> DefaultCfg:
    """The pretrained weights of one model, the default first, as `register_model` wants them."""
    tagged = {cfg.tag or "": cfg for cfg in weights}
    return DefaultCfg(deque(tagged), tagged, any(cfg.has_weights for cfg in tagged.values()))


def __getattr__(name: str) -> Any:
    """``hatify.timm_models.hat_resnet18``: entry points, as in timm's own modules."""
    if name.startswith(PREFIX) and is_model(name):
        return model_entrypoint(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register_all()
