"""Dictionaries that were read have a name of their own in the report, the one that claims call them by."""

import re
from pathlib import Path

from omegaconf import OmegaConf

from reports.claims import PAPERS
from reports.collect import CONF, PRETRAINED, Cell


def target(method: str) -> str:
    return str(OmegaConf.load(CONF / f"method/{method}.yaml").get("_target_"))  # None: as in its defaults


def cell(method: str, **settings: str) -> Cell:
    return Cell("leask_batchtopk", "demo", 0, Path(), {"fve": 0.5}, {"method._target_": target(method), **settings}, {})


def test_a_dictionary_that_was_read_is_called_pretrained_and_a_trained_one_by_its_class():
    assert cell("pretrained").method == PRETRAINED == "Pretrained"
    assert cell("batchtopk").method == "BatchTopK"


def test_the_methods_that_claims_name_are_those_that_cells_have():
    known = {cell(path.stem).method for path in (CONF / "method").glob("*.yaml")}
    text = "\n".join(path.read_text() for path in (PAPERS / "leask/claims").glob("*.yaml"))
    listed = [name for group in re.findall(r"methods: (?:&\w+ )?\[([^\]]*)\]", text) for name in group.split(", ")]
    assert PRETRAINED in listed and set(listed) <= known
    assert set(re.findall(r"\b[ab]: (\w+)", text)) <= known
