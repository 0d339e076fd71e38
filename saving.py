"""How a model with strategies is written to a file, and found again.

The config of such a model is `{"schema": 1, "strategies": {name: options}, "model": the plain model}`.
All generated classes go under one registered name, so that a file needs no class that exists only at
run time; options are data, checked on the way in like any others.
"""

import inspect
import json
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import keras

from trainstep import _seam
from trainstep.errors import SavingError, TrainstepError

if TYPE_CHECKING:
    from trainstep.step import Strategy

SCHEMA = 1
_WITHOUT = "build the plain model in code and load the weights alone, with `load_weights`."
_PACKAGE, _NAME = "trainstep", "Model"


def without_strategies(model: Any) -> type:
    """Return the class `model` had before strategies were applied to it."""
    return type(model).__mro__[type(model).__mro__.index(Saved) + 1]


def check_format(model: Any, arguments: Mapping[str, Any]) -> None:
    """Raise `SavingError` where `model.save` with these `arguments` would write a file that loses the strategies.

    HDF5 and TensorFlow's SavedModel hold the name of a class, and a generated class has none to be found by.
    """
    path = str(arguments["filepath"])
    native = path.endswith(".keras") or path.startswith("hf://") or arguments.get("zipped") is False
    if is_generated(type(model)) and not (native and arguments.get("save_format") in (None, "keras")):
        raise SavingError(
            f"A model with strategies is saved to a path that ends in '.keras', not to {path!r}: other formats lose "
            "them. For inference elsewhere use `model.export(path)`; for the weights alone `model.save_weights(path)`; "
            "for the plain model call `trainstep.remove(model)`, compile it anew, as its optimizer holds state of "
            "strategies, and save."
        )


class Saved(Strategy if TYPE_CHECKING else object):
    """Sits between the strategies and the plain class of every generated class."""

    def save(self, *args: Any, **kwargs: Any) -> Any:
        """Save as Keras does, see `keras.Model.save`, and refuse a format that would lose the strategies.

        Raises:
            SavingError: the path does not end in `.keras`.
        """
        check_format(self, inspect.signature(super().save).bind(*args, **kwargs).arguments)
        if _seam.is_saved_without_state(getattr(self, "optimizer", None)):
            warnings.warn(
                f"Keras does not save the variables of {type(self.optimizer).__name__}, a legacy optimizer, in a "
                "'.keras' file: its slots and the state of strategies start anew when it is loaded. To keep them, use "
                "tf.train.Checkpoint(model=model, optimizer=model.optimizer).",
                stacklevel=2,
            )
        return super().save(*args, **kwargs)

    def to_json(self, **kwargs: Any) -> str:
        """Return what `keras.models.model_from_json` makes the model from, uncompiled; `kwargs` go to `json.dumps`."""
        if not is_generated(type(self)):
            return super().to_json(**kwargs)
        # Keras 2 itself would write the name of the class, by which a generated class cannot be found.
        return json.dumps(keras.saving.serialize_keras_object(self), **kwargs)

    def __reduce__(self) -> Any:
        restore, *rest = super().__reduce__()
        if is_generated(type(self)) and inspect.ismethod(restore):
            # A class method, on Keras 3, which pickle looks up in this class: by its name, and in vain.
            restore = getattr(keras.Model, restore.__name__)
        return (restore, *rest)

    def get_config(self) -> dict[str, Any]:
        """Return the strategies by name with their options, and the config of the plain model."""
        self.detach_strategies()
        try:
            return self._generated_config() if is_generated(type(self)) else super().get_config()
        finally:
            if is_generated(type(self)) or getattr(self, "optimizer", None) is not None:
                self.attach_strategies()  # A class with strategies among its bases has them from `compile` on.

    def _generated_config(self) -> dict[str, Any]:
        composed = type(self)
        object.__setattr__(self, "__class__", without_strategies(self))
        try:
            plain: Any = keras.saving.serialize_keras_object(self)
        finally:
            object.__setattr__(self, "__class__", composed)
        plain.pop("compile_config", None)
        strategies = {name: options.model_dump(mode="json") for name, options in composed.strategy_options.items()}
        return {"schema": SCHEMA, "strategies": strategies, "model": plain}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Rebuild a model from what `get_config` returned."""
        if not is_generated(cls):
            return super().from_config(config, custom_objects)
        return SavedModel.from_config(config, custom_objects)


@keras.saving.register_keras_serializable(_PACKAGE, _NAME)
class SavedModel:
    """What the registered name stands for in a file: a plain model and the strategies to apply to it."""

    get_config = Saved.get_config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Return the model, with its strategies applied.

        Raises:
            SavingError: the file is of a later version.
            UnknownStrategyError, InvalidOptionsError: a strategy or an option is unknown here.
        """
        from trainstep.composition import apply  # noqa: PLC0415  It imports this module.

        schema, names = config.get("schema"), config.get("strategies")
        if isinstance(schema, int) and schema > SCHEMA:
            raise SavingError(
                f"The file holds strategies in schema {schema}, and this version of trainstep reads {SCHEMA}. "
                f"Install a later version; or {_WITHOUT}"
            )
        if schema != SCHEMA or not (isinstance(names, dict) and names) or "model" not in config:
            raise SavingError(
                "The file is damaged: the config of a model with strategies has a schema, a mapping of strategies and "
                f"the plain model, and this one has {', '.join(sorted(config)) or 'nothing'}. What can be done: "
                f"{_WITHOUT}"
            )
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects)
        try:
            return apply(model, names)
        except TrainstepError as error:
            raise type(error)(
                f"{error} The file asks for the strategies {', '.join(names)}. To go without: {_WITHOUT}"
            ) from error


def is_generated(model_class: type) -> bool:
    """Tell whether `model_class` was made by `model_class` or `apply`, and is no subclass of one that was."""
    return keras.saving.get_registered_name(model_class) == f"{_PACKAGE}>{_NAME}"


def share_name(model_class: type) -> None:
    """Let objects of `model_class` be saved under the one name that `SavedModel` answers to."""
    # The second call takes the name back for loading; a class keeps the name it is saved under.
    for owner in (model_class, SavedModel):
        keras.saving.register_keras_serializable(_PACKAGE, _NAME)(owner)
