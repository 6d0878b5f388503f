import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core.errors import UserError
from core.models.sites import FAMILIES, SITE_KINDS, Site, Tap, attach, parse_site


@given(kind=st.sampled_from(SITE_KINDS), layer=st.integers(0, 200))
def test_a_site_survives_writing_and_parsing(kind, layer):
    assert parse_site(str(Site(kind, layer)), n_layers=layer + 1) == (kind, layer)


@pytest.mark.parametrize(
    "site", ["", "resid_pre", "resid_pre.", "resid_pre.-1", "resid_pre.8.1", "attn_out.3", "mlp_out.x"]
)
def test_a_bad_site_is_refused_with_the_list_of_valid_ones(site):
    with pytest.raises(UserError, match=r"site: .*resid_pre\.L, resid_post\.L, mlp_out\.L, mlp_hidden\.L.*0 to 11"):
        parse_site(site, n_layers=12)


def test_the_error_for_a_layer_beyond_the_model_has_the_number_of_layers():
    with pytest.raises(UserError, match=r"site: mlp_out\.40 does not exist: the model has 12 layers"):
        parse_site("mlp_out.40", n_layers=12)


def test_the_error_for_resid_pre_after_the_last_layer_suggests_resid_post():
    with pytest.raises(UserError, match=r"12 layers \(0 to 11\).* is resid_post\.11"):
        parse_site("resid_pre.12", n_layers=12)


def test_without_a_model_any_layer_is_accepted():
    assert parse_site("resid_pre.999") == ("resid_pre", 999)


class Block(nn.Module):
    """A block that returns a tuple, as in older versions of transformers."""

    def forward(self, x, scale):
        return scale * x, "cache"


def test_a_replacement_keeps_the_other_inputs_and_outputs_of_a_module():
    block, x = Block(), torch.ones(2)
    with attach(Tap(block, "input"), lambda x: x + 1):
        assert block(x, 3.0)[0].tolist() == [6.0, 6.0]
    with attach(Tap(block, "output"), lambda x: x + 1):
        output = block(x, 3.0)
    assert output[0].tolist() == [4.0, 4.0] and output[1] == "cache"
    assert block(x, 3.0)[0].tolist() == [3.0, 3.0]


def test_a_hook_that_returns_none_changes_nothing():
    block, seen = Block(), []
    with attach(Tap(block, "input"), seen.append), attach(Tap(block, "output"), seen.append):
        assert block(torch.ones(1), 3.0)[0].item() == 3.0
    assert [x.item() for x in seen] == [1.0, 3.0]


def test_the_table_has_every_family_of_the_papers():
    assert set(FAMILIES) == {"gpt2", "gpt_neox", "llama", "gemma2", "qwen2", "qwen3"}
