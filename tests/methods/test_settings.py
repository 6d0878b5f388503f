"""A method's dataclass and its YAML have the same settings, and no wrong type passes."""

import json
from dataclasses import fields
from typing import Any, cast, get_type_hints

import pytest
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from core.errors import UserError
from core.methods.settings import method_class, settings_of
from tests.composing import CONF, composed

NAMES = sorted(path.stem for path in (CONF / "method").glob("*.yaml") if not path.stem.startswith("pretrained"))


def node_of(name: str) -> dict[str, Any]:
    """`conf/method/<name>.yaml` with its defaults, resolved."""
    cfg = composed("experiment=leask_batchtopk", "scale=smoke", f"method={name}")
    node = OmegaConf.to_container(cfg.method, resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}


NODES = {name: node_of(name) for name in NAMES}
EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_the_yaml_says_every_setting_of_the_dataclass_and_no_other(name: str):
    keys = set(NODES[name]) - {"_target_"}
    assert keys == {entry.name for entry in fields(settings_of(NODES[name]))}


@EVERY
def test_a_method_holds_the_settings_of_its_node_and_its_hyperparameters_give_them_back(name: str):
    node = NODES[name] | {"d_model": 8, "dict_size": 12} | ({"k": 3} if "k" in NODES[name] else {})
    method, expected = instantiate(node), settings_of(node)
    assert method.settings == expected and (method.d_model, method.dict_size) == (8, 12)
    plain = json.loads(json.dumps(method.hyperparameters()))
    assert plain == {key: value for key, value in node.items() if key != "_target_"}
    assert settings_of({"_target_": node["_target_"], **plain}) == expected


MAY_BE_NULL = ("enc_init_norm", "k_aux")  # of TopK and BatchTopK


@given(st.data())
def test_a_wrong_type_is_refused_with_the_key_named(data: st.DataObject):
    """A setting takes no word that no choice has, and no list of words; a number no boolean. Few take null."""
    node = NODES[data.draw(st.sampled_from(NAMES))]
    key = data.draw(st.sampled_from(sorted(set(node) - {"_target_"})))
    wrong = st.just("no such word") | st.lists(st.text(), max_size=3)
    if key not in MAY_BE_NULL:
        wrong = wrong | st.none()
    if not isinstance(node[key], bool):
        wrong = wrong | st.booleans()
    takes_fractions = get_type_hints(cast(Any, method_class(node["_target_"])).settings_class)[key] is float
    if not takes_fractions and (isinstance(node[key], int) or key in MAY_BE_NULL[1:]):
        wrong = wrong | st.floats(0.01, 0.99) | st.just(float("nan"))
    with pytest.raises(UserError, match=rf"^method\.{key}: "):
        settings_of(node | {key: data.draw(wrong)})


def test_the_cost_of_a_row_is_the_encoders_matrix():
    assert settings_of(NODES["topk"] | {"d_model": 10, "dict_size": 70, "k": 2}).cost_per_row == 700


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dict_size": 64.5}, "method.dict_size: 64.5 must be a whole number."),
     ({"dict_size": -3}, "method.dict_size: -3 must be positive."),
     ({"k": None}, "method.k: null must be a whole number."),
     ({"k": "abc"}, "method.k: 'abc' must be a whole number."),
     ({"betas": [0.9]}, "method.betas: [0.9] must be a list of 2 numbers."),
     ({"betas": [0.9, 1.0]}, "method.betas: [0.9, 1.0] must be two numbers in [0, 1)."),
     ({"_target_": "os.system"}, "os.system: only classes below core.methods are loaded."),
     ({"_target_": "core.methods.base.ramp"}, "core.methods.base.ramp is no dictionary-learning method."),
     ({"_target_": "core.methods.pretrained.Pretrained"},
      "method._target_: core.methods.pretrained.Pretrained is not trained, so it has no settings.")],
)  # fmt: skip
def test_the_message_names_the_setting_its_value_and_the_rule(changes: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        settings_of(NODES["batchtopk"] | changes)
    assert str(error.value) == message


@EVERY
def test_a_method_has_a_version_for_the_keys_of_the_store(name: str):
    assert method_class(NODES[name]["_target_"]).version >= 1
