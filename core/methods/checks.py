"""Checks of a method's settings; a failed one names the setting as it is called in the configuration."""

from __future__ import annotations

from typing import Any, get_args

from core.errors import UserError


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """`UserError` that names `method.<name>` and says what it must do."""
    if not condition:
        raise UserError(f"method.{name}: {value!r} will not do, it must {rule}.")


def require_one_of(value: object, name: str, choices: Any) -> None:
    """`UserError` unless `value` is one of the values of the `Literal` `choices`."""
    require(value in get_args(choices), name, value, f"be one of {', '.join(map(str, get_args(choices)))}")


def require_k(k: int, dict_size: int) -> None:
    """`UserError` unless k latents can be chosen of `dict_size`."""
    require(k >= 1 and k == int(k), "k", k, "be a whole number, at least 1")
    if k > dict_size:
        raise UserError(
            f"method.k is {k}, but a dictionary has only method.dict_size = {dict_size} latents: "
            "lower method.k or raise method.dict_size."
        )
