"""Every test with `lm` runs on a small random model of each architecture, loaded from a folder."""

import shutil

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from core.errors import UserError
from core.models import language_model
from core.models.language_model import Edit, load_language_model
from core.models.sites import FAMILIES, SITE_KINDS, attach

D, N_LAYERS, N_CTX, V, HIDDEN = 24, 3, 16, 261, 40
COMMON = {
    "vocab_size": V,
    "max_position_embeddings": N_CTX,
    "hidden_size": D,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
ROTARY = COMMON | {"intermediate_size": HIDDEN, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(**COMMON, n_inner=HIDDEN),
    "gpt_neox": GPTNeoXConfig(**COMMON, intermediate_size=HIDDEN),
    "llama": LlamaConfig(**ROTARY),
    "gemma2": Gemma2Config(**ROTARY, head_dim=8, sliding_window=4, final_logit_softcapping=3.0),
    "qwen2": Qwen2Config(**ROTARY),
    "qwen3": Qwen3Config(**ROTARY, head_dim=8),
}
FINAL_NORM = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}  # of the others: model.norm
BEFORE_MLP = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}  # of the others: post_attention_layernorm
EVERY_SITE = [f"{kind}.{layer}" for kind in SITE_KINDS for layer in range(N_LAYERS)]


def settings(family, folder, **changed):
    attention = "eager" if FAMILIES[family].needs_eager else "sdpa"
    plain = {"name": family, "source": str(folder), "revision": None, "dtype": "float32", "d_model": D}
    plain |= {"n_layers": N_LAYERS, "attn_implementation": attention, "device": "cpu"}
    return OmegaConf.create(plain | changed)


def save_model(family, folder, **kwargs):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family])
    with torch.no_grad():  # as initialised, blocks do almost nothing and biases are zero
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **kwargs)
    vocabulary = ["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges=[]))
    letters.pre_tokenizer, letters.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>").save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    for family in CONFIGS:
        save_model(family, root / family)
    return root


@pytest.fixture(scope="module")
def loaded(folders):
    return {family: load_language_model(settings(family, folders / family)) for family in CONFIGS}


@pytest.fixture(params=list(CONFIGS))
def lm(request, loaded):
    return loaded[request.param]


@pytest.fixture
def gpt2_folder(folders):
    return folders / "gpt2"


@pytest.fixture
def tokens():
    return torch.randint(V, (3, 12), generator=torch.Generator().manual_seed(1))


def identity(x):
    return x


def test_a_loaded_model_knows_its_sizes_and_is_frozen(lm):
    assert (lm.d_model, lm.n_layers, lm.n_ctx, lm.vocab_size) == (D, N_LAYERS, N_CTX, V)
    ids = lm.tokenizer("d = 24", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6 and lm.tokenizer.decode(ids) == "d = 24"
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())
    assert lm.device.type == "cpu" and lm.dtype == torch.float32 and lm.revision is None


def test_the_residual_stream_equals_output_hidden_states(lm, tokens):
    hidden = lm.model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    final_norm = lm.model.get_submodule(FINAL_NORM.get(lm.family, "model.norm"))
    for layer in range(N_LAYERS):
        assert torch.equal(lm.capture(tokens, f"resid_pre.{layer}"), hidden[layer])
    for layer in range(N_LAYERS - 1):
        assert torch.equal(lm.capture(tokens, f"resid_post.{layer}"), hidden[layer + 1])
    assert torch.equal(final_norm(lm.capture(tokens, f"resid_post.{N_LAYERS - 1}")), hidden[-1])


def test_mlp_out_is_what_the_mlp_adds_to_the_residual_stream(lm, tokens):
    block = lm.model.get_submodule(FAMILIES[lm.family].blocks)[1]
    seen = {}
    if lm.family == "gpt_neox":  # attention and MLP read the same input and are added together
        hook = block.attention.register_forward_hook(lambda _, __, out: seen.update(attention=out[0]))
    else:
        norm = block.get_submodule(BEFORE_MLP.get(lm.family, "post_attention_layernorm"))
        hook = norm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    lm.logits(tokens)
    hook.remove()
    before = seen["before"] if "before" in seen else lm.capture(tokens, "resid_pre.1") + seen["attention"]
    added = lm.capture(tokens, "resid_post.1") - before
    torch.testing.assert_close(lm.capture(tokens, "mlp_out.1"), added, atol=1e-5, rtol=1e-4)


def test_mlp_hidden_times_the_down_projection_is_mlp_out(lm, tokens):
    block = lm.model.get_submodule(FAMILIES[lm.family].blocks)[1]
    hidden = lm.capture(tokens, "mlp_hidden.1")
    down = block.get_submodule(FAMILIES[lm.family].mlp_down)
    weight = down.weight if lm.family == "gpt2" else down.weight.T  # GPT-2 keeps its matrices transposed
    out = hidden @ weight + (0 if down.bias is None else down.bias)
    out = block.post_feedforward_layernorm(out) if lm.family == "gemma2" else out
    torch.testing.assert_close(out, lm.capture(tokens, "mlp_out.1"), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("site", EVERY_SITE)
def test_a_capture_equals_the_activation_of_a_whole_forward_pass_and_has_the_width_of_its_site(lm, tokens, site):
    seen = []
    with attach(lm._tap(site), seen.append):
        lm.logits(tokens)
    captured = lm.capture(tokens, site)
    assert torch.equal(captured, seen[0])
    assert captured.shape == (3, 12, lm.width(site)) and not captured.requires_grad
    assert lm.width(site) == (HIDDEN if site.startswith("mlp_hidden") else D)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_a_capture_computes_nothing_after_its_site(lm, tokens, kind):
    family, layer = FAMILIES[lm.family], 1
    done = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: done.append(name))
        for name, module in lm.model.named_modules()
        if name
    ]
    lm.capture(tokens, f"{kind}.{layer}")
    for hook in hooks:
        hook.remove()
    block = f"{family.blocks}.{layer}"
    in_block = {name.removeprefix(f"{block}.") for name in done if name.startswith(f"{block}.")}
    outside = [name for name in done if name != block and not name.startswith(f"{block}.")]
    assert f"{family.blocks}.0" in outside
    assert not any(name.startswith(f"{family.blocks}.2") for name in outside)
    assert lm.model.get_output_embeddings() not in [lm.model.get_submodule(name) for name in done]
    assert FINAL_NORM.get(lm.family, "model.norm") not in done
    assert len(done) == len(set(done))
    if kind == "resid_pre":
        assert not in_block and block not in done
    elif kind == "resid_post":
        assert block in done
    else:
        assert block not in done and (family.mlp_out in in_block) == (kind == "mlp_out")
        assert (family.mlp_down in in_block) == (kind == "mlp_out")


def test_a_capture_does_not_change_the_model(lm, tokens):
    before = lm.logits(tokens)
    for site in EVERY_SITE:
        lm.capture(tokens, site)
    assert torch.equal(lm.logits(tokens), before)
    assert len(lm.model(tokens, output_hidden_states=True).hidden_states) == N_LAYERS + 1


@pytest.mark.parametrize("site", EVERY_SITE)
def test_an_identity_edit_does_not_change_the_logits_at_all(lm, tokens, site):
    clean = lm.logits(tokens)
    assert torch.equal(lm.logits(tokens, Edit(site, identity)), clean)
    assert torch.equal(lm.logits(tokens, Edit(site, identity, torch.arange(4, 9))), clean)


@pytest.mark.parametrize("site", EVERY_SITE)
def test_logits_with_given_activations_equal_those_of_an_edit_that_inserts_them(lm, tokens, site):
    x = lm.capture(tokens, site)
    assert torch.equal(lm.logits_with(x, tokens, site), lm.logits(tokens))
    assert torch.equal(lm.logits_with(x.cos(), tokens, site), lm.logits(tokens, Edit(site, torch.cos)))
    assert torch.equal(lm.capture(tokens, site), x)


def test_logits_with_a_given_residual_stream_compute_nothing_before_it(lm, tokens):
    x = lm.capture(tokens, "resid_post.1")
    blocks = lm.model.get_submodule(FAMILIES[lm.family].blocks)
    ran = []
    handles = [
        child.register_forward_hook(lambda *_, layer=layer: ran.append(layer))
        for layer, block in enumerate(blocks)
        for child in block.children()
    ]
    lm.logits_with(x, tokens, "resid_post.1")
    for handle in handles:
        handle.remove()
    assert set(ran) == {2}


@pytest.mark.parametrize("site", EVERY_SITE)
def test_an_edit_to_zero_changes_the_logits(lm, tokens, site):
    edited = lm.logits(tokens, Edit(site, torch.zeros_like))
    assert (edited - lm.logits(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_an_edit_changes_nothing_before_the_first_edited_position(lm, tokens, kind):
    clean = lm.logits(tokens)
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[1, 5], mask[1, 8], mask[2, 11] = True, True, True
    changed = (lm.logits(tokens, Edit(f"{kind}.1", torch.zeros_like, mask)) - clean).abs().amax(-1)
    assert (changed[0] == 0).all() and (changed[1, :5] == 0).all() and (changed[2, :11] == 0).all()
    assert changed[1, 5] > 1e-3 and changed[1, 8] > 1e-3 and changed[2, 11] > 1e-3


def test_an_edit_at_positions_receives_only_those_in_row_major_order(lm, tokens):
    x, received = lm.capture(tokens, "resid_pre.1"), []

    def double(chosen):
        received.append(chosen.clone())
        return 2 * chosen

    with lm.edited(Edit("resid_pre.1", double, torch.tensor([7, -1]))):
        edited = lm.capture(tokens, "resid_pre.1")
    assert torch.equal(received[0], x[:, [7, 11]].flatten(0, 1))
    x[:, [7, 11]] *= 2
    assert torch.equal(edited, x)


def test_an_edit_of_the_last_residual_stream_decides_the_logits(lm, tokens):
    """Row 0's final stream written into every row gives row 0's logits everywhere."""
    last = f"resid_post.{N_LAYERS - 1}"
    rows = lm.logits(tokens, Edit(last, lambda x: x[:1].expand_as(x)))
    assert torch.equal(rows, lm.logits(tokens)[:1].expand_as(rows))


def test_nested_edits_apply_from_the_outside_in_and_end_with_their_block(lm, tokens):
    x = lm.capture(tokens, "mlp_out.1")
    with lm.edited(Edit("mlp_out.1", lambda x: x + 1)), lm.edited(Edit("mlp_out.1", lambda x: 2 * x)):
        assert torch.equal(lm.capture(tokens, "mlp_out.1"), 2 * (x + 1))
    assert torch.equal(lm.capture(tokens, "mlp_out.1"), x)


def test_an_edit_that_fails_is_undone(lm, tokens):
    clean = lm.logits(tokens)
    with pytest.raises(ValueError, match=r"Edit of resid_pre.1: fn turned \(3, 12, 24\) into \(3, 12\)"):
        lm.logits(tokens, Edit("resid_pre.1", lambda x: x.sum(-1)))
    assert torch.equal(lm.logits(tokens), clean)


def test_an_edit_at_no_positions_does_not_call_its_function(loaded, tokens):
    lm = loaded["gpt2"]
    none = torch.zeros(tokens.shape, dtype=torch.bool)
    assert torch.equal(lm.logits(tokens, Edit("resid_pre.1", lambda x: 1 / 0, none)), lm.logits(tokens))


@pytest.mark.parametrize("positions", [torch.tensor([12]), torch.tensor([1.0]), torch.ones(3, 11, dtype=torch.bool)])
def test_positions_that_do_not_fit_the_rows_are_an_error(loaded, tokens, positions):
    with pytest.raises(ValueError, match=r"Edit.positions"):
        loaded["gpt2"].logits(tokens, Edit("resid_pre.1", identity, positions))


def test_token_losses_average_to_the_loss_that_transformers_computes(lm, tokens):
    losses = lm.token_losses(tokens)
    assert losses.shape == (3, 11) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), lm.model(tokens, labels=tokens).loss)


def test_token_losses_follow_from_the_logits_with_or_without_an_edit_in_any_number_of_pieces(lm, tokens, monkeypatch):
    edit = Edit("resid_pre.1", lambda x: x.mean((0, 1), keepdim=True).expand_as(x))  # depends on all rows at once
    for each in (None, edit):
        log_p = lm.logits(tokens, each)[:, :-1].log_softmax(-1)
        expected = -log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        monkeypatch.setattr(language_model, "HEAD_BYTES", 2**28)
        torch.testing.assert_close(lm.token_losses(tokens, each), expected)
        monkeypatch.setattr(language_model, "HEAD_BYTES", 4 * 4 * V)  # four positions at a time
        torch.testing.assert_close(lm.token_losses(tokens, each), expected)


def test_a_row_gives_the_same_activations_in_a_batch_and_alone(lm, tokens):
    together = lm.capture(tokens, "mlp_hidden.2")
    alone = torch.cat([lm.capture(row[None], "mlp_hidden.2") for row in tokens])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_model_loads_in_bfloat16(lm, folders, tokens):
    half = load_language_model(settings(lm.family, folders / lm.family, dtype="bfloat16"))
    assert half.dtype == half.capture(tokens, "resid_post.1").dtype == half.logits(tokens).dtype == torch.bfloat16
    # An edit may compute in fp32, and losses are fp32 whatever the model is.
    edited = half.token_losses(tokens, Edit("resid_pre.1", lambda x: x.float()))
    assert edited.dtype == torch.float32 and torch.equal(edited, half.token_losses(tokens))
    assert (edited.mean() - lm.token_losses(tokens).mean()).abs() < 0.2


def test_sites_beyond_the_model_and_bad_tokens_are_errors(lm, tokens):
    with pytest.raises(UserError, match=r"site: resid_pre.3 .*3 layers.*resid_post.2"):
        lm.capture(tokens, "resid_pre.3")
    with pytest.raises(UserError, match=r"site: 'attn.1' is not one of resid_pre.L"):
        lm.logits(tokens, Edit("attn.1", identity))
    with pytest.raises(UserError, match=r"n_ctx: the rows have 17 tokens, but .* reads at most 16"):
        lm.logits(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(UserError, match=r"id 261 is not in the vocabulary"):
        lm.capture(torch.tensor([[261]]), "resid_pre.0")
    with pytest.raises(ValueError, match=r"rows"):
        lm.capture(tokens[0], "resid_pre.0")


def test_gemma_with_fused_attention_is_an_error(folders):
    with pytest.raises(UserError, match=r"model.attn_implementation=eager"):
        load_language_model(settings("gemma2", folders / "gemma2", attn_implementation="sdpa"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"d_model": 32}, "model.d_model is 32, but .* has 24. Set model.d_model=24"),
        ({"d_model": 23.5}, "model.d_model: 23.5 must be a whole number"),
        ({"n_layers": 12}, "model.n_layers is 12, but .* has 3"),
        ({"dtype": "int8"}, "model.dtype: 'int8' must be one of float32, bfloat16"),
        ({"device": "gpu"}, "model.device: 'gpu' must be one of auto, cpu"),
        ({"source": "???"}, "model.source is not set.*model=bundled"),
        ({"source": "/no/such/folder"}, "model.source: there is no folder /no/such/folder. model=bundled"),
        ({"attention": "sdpa"}, "model.attention: there is no such setting. Did you mean model.attn_implementation"),
    ],
)
def test_the_error_for_a_wrong_setting_names_it_with_a_way_out(gpt2_folder, changed, message):
    with pytest.raises(UserError, match=message):
        load_language_model(settings("gpt2", gpt2_folder, **changed))


@pytest.mark.parametrize("given", [None, "???"])
def test_width_and_number_of_layers_may_be_left_to_the_model(gpt2_folder, given):
    lm = load_language_model(settings("gpt2", gpt2_folder, n_layers=None, d_model=given))
    assert (lm.n_layers, lm.d_model) == (N_LAYERS, D)


def test_the_error_for_an_unsupported_family_lists_the_supported_ones(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"'bert'; supported: gpt2, gpt_neox, llama, gemma2, qwen2, qwen3"):
        load_language_model(settings("gpt2", tmp_path))


def test_a_folder_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no config.json.*model=bundled"):
        load_language_model(settings("gpt2", tmp_path))


def test_pickled_weights_are_not_read(tmp_path, gpt2_folder):
    shutil.copytree(gpt2_folder, tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save({"transformer.wte.weight": torch.zeros(V, D)}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match=r"no weights as safetensors.*model=bundled"):
        load_language_model(settings("gpt2", tmp_path / "pickled"))
