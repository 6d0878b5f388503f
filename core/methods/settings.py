"""The settings of a method: one frozen dataclass per method names and checks them; the YAML has their values.

A method's constructor, its hyperparameters and the key of a stored dictionary come from the dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Literal

from core.checked import Checked, at_least, between, positive, rule
from core.errors import UserError, shown
from core.input_norm import Normalisation
from core.methods.centre import BDecInit
from core.methods.dictionary import Dictionary

BEFORE = {"b_dec_init": "zeros", "enc_init_norm": None}  # what was done before these settings existed
DecoderNorm = Literal["before_step", "after_step", "rows_compat", "none"]


@dataclass(frozen=True, kw_only=True)
class Settings(Checked):
    """What every method that is trained has.

    d_model            width d of the activations
    dict_size          number m of latents
    lr, betas          of Adam (eps 1e-8, no weight decay)
    input_norm         how activations are normalised first (`core.input_norm`); losses are in that space.
                       `scalar` and `shared_scalar` are measured on the first batch
    seed               of the initialisation, which depends on the shape as well: sizes share no rows
    b_dec_init         where b_dec starts (`core.methods.centre`): `zeros`, or `mean` or `geometric_median` of the first
                       batch, over all ranks. Parameters that a training starts from (`core.fleet.Start`) go before it
    decoder_norm       keep decoder rows at unit norm and take the gradient's part along them away: rescaled before the
                       optimiser's step (then saved rows are off by O(lr), as in the BatchTopK authors' code) or after.
                       `rows_compat`: instead the columns of W_dec, one for each coordinate, get unit norm after the
                       step, and the gradient stays whole. This is the axis slip of O'Neill et al.'s GPT-2 code, which
                       normalised the rows of a [d, m] matrix: atoms then have a norm of about sqrt(d / m)
    dead_after_tokens  a latent is dead when it has not fired for this many tokens
    grad_clip          largest norm of the whole gradient
    warmup_steps       the learning rate rises linearly over this many steps
    decay_fraction     it falls linearly to zero over this last part of `n_steps`, which the trainer must then set
    """

    node: ClassVar[str] = "method"
    d_model: int = positive()
    dict_size: int = positive()
    lr: float = positive()
    betas: tuple[float, float] = rule(lambda betas: all(0 <= beta < 1 for beta in betas), "be two numbers in [0, 1)")
    input_norm: Normalisation
    seed: int
    b_dec_init: BDecInit
    decoder_norm: DecoderNorm
    dead_after_tokens: int = positive()
    grad_clip: float = positive()
    warmup_steps: int = at_least(0)
    decay_fraction: float = between(0, 1)

    @property
    def needs_calibration(self) -> bool:
        """Whether inference needs something that is measured on batches after the training."""
        return False

    @property
    def cost_per_row(self) -> int:
        """Of a step, against other methods': entries of the encoder's matrix, which each row is multiplied with."""
        return self.d_model * self.dict_size


def require_k(k: int, dict_size: int, node: str = "method") -> None:
    """`UserError` unless k latents can be chosen from `dict_size`."""
    if k > dict_size:
        raise UserError(
            f"{node}.k: {k} is too much for a dictionary with only {node}.dict_size = {dict_size} latents: "
            f"lower {node}.k or raise {node}.dict_size."
        )


def method_class(name: str) -> type[Dictionary]:
    """The class of a full name. Raises UserError unless it is a dictionary below `core.methods`."""
    module, _, attribute = name.rpartition(".")
    if not module.startswith("core.methods."):
        raise UserError(f"{shown(name)}: only classes below core.methods are loaded.")
    try:
        cls = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{shown(name)}: there is no module {shown(module)}.") from error
    if not (isinstance(cls, type) and issubclass(cls, Dictionary)):
        raise UserError(f"{shown(name)} is no dictionary-learning method.")
    return cls


def rebuilt(description: Mapping[str, Any]) -> Dictionary:
    """The dictionary of a `Dictionary.description`, before training; the description may be an earlier version's."""
    cls, values = method_class(description["class"]), dict(description["hyperparameters"])
    settings_class = getattr(cls, "settings_class", None)
    if settings_class is not None:
        names = [entry.name for entry in fields(settings_class)]
        values = {name: value for name, value in BEFORE.items() if name in names} | values
    if values.get("b_dec_init") == "zero":  # its name in one method, before all had it
        values["b_dec_init"] = "zeros"
    return cls(**values)


def settings_of(values: Mapping[str, Any], node: str = "method") -> Settings:
    """The checked settings of a configuration as in conf/method, by the class that `_target_` names.

    node  where they stand in the configuration
    Raises UserError for a class that is not trained, and for values that `Settings` refuses."""
    own = dict(values)
    name = own.pop("_target_")
    settings_class = getattr(method_class(name), "settings_class", None)
    if settings_class is None:
        raise UserError(f"{node}._target_: {name} is not trained, so it has no settings.")
    return settings_class.of(own, node)
