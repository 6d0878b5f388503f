from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from core.analysis.editing import (
    Composition,
    Directions,
    Editor,
    MetaEdits,
    Outcome,
    ask,
    edited_rows,
    entity_latents,
    single_token,
    the_latent,
)
from core.errors import UserError
from core.input_norm import InputNorm
from core.kernels.codes import DenseCodes
from core.methods.batchtopk import BatchTopK
from core.models.language_model import Edit, LanguageModel, load_language_model
from core.seeding import generator
from core.text.facts import Facts

ATTRIBUTES = {"place": ["north", "south", "east"], "job": ["cook", "smith", "guard"], "tool": ["key", "hook", "rope"]}
VALUES = [value for values in ATTRIBUTES.values() for value in values]
ENTITIES = ["ana", "bo", "cy"]
FACTS = Facts(
    answers={name: {a: values[i] for a, values in ATTRIBUTES.items()} for i, name in enumerate(ENTITIES)},
    prompts={a: [f"the {a} of {{entity}} is"] for a in ATTRIBUTES},
    answer_prefix="",
)


def words_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<bos>", *ENTITIES, *VALUES, "the", "of", "is", *ATTRIBUTES, "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", unk_token="<unk>")


class LinearWorld:
    """A language model whose knowledge is known: the last logits are the sum of the activations at the site times a
    direction for each value; an entity's activation is the sum of the directions of its values, all others are 0."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.tokenizer = words_tokenizer()
        values = VALUES
        self.directions = torch.eye(len(values))  # [V, d]
        self.readout = torch.zeros(len(values), len(self.tokenizer))
        self.embedding = torch.zeros(len(self.tokenizer), len(values))
        for i, value in enumerate(values):
            self.readout[i, self.tokenizer.convert_tokens_to_ids(value)] = 1
            for entity in ENTITIES:
                if value in FACTS.answers[entity].values():
                    self.embedding[self.tokenizer.convert_tokens_to_ids(entity), i] = 1

    def capture(self, tokens: Tensor, site: str) -> Tensor:
        return self.embedding[tokens]

    def logits_with(self, x: Tensor, tokens: Tensor, site: str, last: int = 0) -> Tensor:
        return x.cumsum(1) @ self.readout


class OneLatentEach:
    """A dictionary with one latent for each entity (at unit norm), and a last one that fires everywhere."""

    def __init__(self, world: LinearWorld) -> None:
        ids = world.tokenizer.convert_tokens_to_ids(ENTITIES)
        rows = torch.nn.functional.normalize(world.embedding[ids], dim=1)
        self.W_dec, self.b_dec = torch.cat([rows, torch.zeros(1, rows.shape[1])]), torch.zeros(rows.shape[1])
        self.norm, self.dict_size = InputNorm("none"), 4

    def encode(self, x: Tensor) -> DenseCodes:
        return DenseCodes(torch.cat([(x @ self.W_dec[:3].T).relu(), torch.ones(len(x), 1)], 1))

    def decode(self, codes: DenseCodes) -> Tensor:
        return codes.dense() @ self.W_dec


@pytest.fixture(scope="module")
def world() -> LinearWorld:
    return LinearWorld()


def compositions(world: LinearWorld, dictionary: Any) -> dict[str, Composition]:
    """The planted ones: a row is its values' directions."""
    return {e: Composition.of(dictionary.W_dec[i] @ world.directions.T) for i, e in enumerate(ENTITIES)}


def planted_outcome(world: LinearWorld, source: str, along: Tensor, preset: str) -> Outcome:
    """ana's row, with the meta-latents of `source`; wanted are cy's values, last of all, so that no tie is theirs."""
    dictionary = OneLatentEach(world)
    composed, asked = compositions(world, dictionary), ask(FACTS, world.tokenizer)
    editor = Editor(dictionary, world, "site", "error_kept", 16)
    meta = Directions(world.directions, torch.zeros(len(world.directions)), along)
    own, other = composed["ana"], composed[source]
    edits = MetaEdits.all_pairs(len(own.values), len(other.values), 64)
    rows = edited_rows(dictionary.W_dec[0], own, other, edits, meta, preset)
    clean = {a: editor.clean(questions[0]) for a, questions in asked["ana"].items()}
    return Outcome(
        {a: editor.with_rows(c, 0, rows) for a, c in clean.items()},
        {a: editor.unedited(c)[0] for a, c in clean.items()},
        dict.fromkeys(ATTRIBUTES, 0),
        dict.fromkeys(ATTRIBUTES, 2),
    )


@pytest.mark.parametrize("preset", ["rebuild", "difference", "script_compat"])
def test_where_attributes_are_the_meta_latents_every_subset_is_reached_and_by_no_control(world, preset):
    along = world.directions
    meta = planted_outcome(world, "cy", along, preset)
    assert meta.reached == set(range(1, 8))
    targets, others = meta.selectivity()
    assert targets > 0.5
    assert preset == "script_compat" or abs(others) < 1e-5
    third = planted_outcome(world, "bo", along, preset)
    assert third.reached == set()
    random = planted_outcome(world, "cy", Directions(along, along[0], along).random(generator(0, "r")).along, preset)
    assert len(random.reached) < 7
    assert meta.metrics()["selectivity_nats"] > random.metrics()["selectivity_nats"]


def test_the_latent_of_an_entity_is_found_and_one_that_fires_everywhere_is_not(world):
    dictionary, asked = OneLatentEach(world), ask(FACTS, world.tokenizer)
    found = entity_latents(dictionary, world, "site", asked, 0.9, 0.5)
    assert [found[entity].latent for entity in ENTITIES] == [0, 1, 2]
    assert found["ana"].specificity == 1 and found["ana"].coverage == 1
    assert found["ana"].activation == pytest.approx(3**0.5)


def test_an_entity_without_a_latent_is_refused_by_name(world):
    dictionary, asked = OneLatentEach(world), ask(FACTS, world.tokenizer)
    dictionary.W_dec[1] = 0
    found = entity_latents(dictionary, world, "site", asked, 0.9, 0.5)
    assert found["bo"] is None and the_latent(found, "cy").latent == 2
    with pytest.raises(UserError, match="no latent stands for 'bo'"):
        the_latent(found, "bo")


def test_a_swap_puts_one_latent_for_another_at_every_position_but_bos(world):
    dictionary, asked = OneLatentEach(world), ask(FACTS, world.tokenizer)
    editor = Editor(dictionary, world, "site", "error_kept", 16)
    clean = editor.clean(asked["ana"]["job"][0])  # BOS the job of ana is
    at_entity = editor.with_swap(clean, 0, 1, value=3**0.5, only_where_active=True)
    values = torch.tensor([0.0, 1.0, 0.0])  # cook goes, smith comes
    everything = torch.zeros(len(world.tokenizer))
    everything[[4 + 3 * a + 1 for a in range(3)]] = 1  # bo's values
    assert torch.allclose(at_entity[0], values - everything.logsumexp(0))
    everywhere = editor.with_swap(clean, 0, 1, value=3**0.5)
    assert torch.allclose(everywhere[0], 5 * values - (5 * everything).logsumexp(0))  # five tokens after BOS


def test_a_value_of_more_than_one_token_is_refused_by_name():
    tokenizer = AutoTokenizer.from_pretrained("core/models/bundled")
    assert tokenizer.decode(single_token(tokenizer, " server")) == " server"
    with pytest.raises(UserError, match=r"' Einstein' is \d tokens"):
        single_token(tokenizer, " Einstein")


def test_an_entity_at_the_beginning_of_a_prompt_has_no_space_before_it(world):
    question = ask(FACTS, world.tokenizer)["bo"]["job"][0]
    assert world.tokenizer.decode(question.tokens[question.entity_position]) == "bo"
    first = Facts(answers=FACTS.answers, prompts={a: ["{entity} is the"] for a in ATTRIBUTES}, answer_prefix="")
    assert ask(first, world.tokenizer)["bo"]["job"][0].entity_position == 1


@given(st.integers(0, 4), st.integers(0, 4))
def test_every_pair_of_subsets_is_there_once_and_the_empty_one_first(n_removable: int, n_addable: int):
    edits = MetaEdits.all_pairs(n_removable, n_addable, 2**8)
    both = torch.cat([edits.removed, edits.added], 1)
    assert len(edits) == 2 ** (n_removable + n_addable) == len(set(map(tuple, both.tolist())))
    assert not both[0].any()


def test_too_many_edits_are_refused_with_their_number():
    with pytest.raises(UserError, match=r"5 meta-latents to remove and 6 to add make 2\^11 = 2,048 edits"):
        MetaEdits.all_pairs(5, 6, 1024)


def edit_by_hand(preset: str, b_dec: Tensor) -> Tensor:
    """A = .8 e0 + .6 e1 at norm 2, as meta-latents e0 .8 and e1 .5; B has e1 .3, e2 .7. Minus e0, plus e1 and e2."""
    row = 2 * torch.tensor([0.8, 0.6, 0.0, 0.0])
    own = Composition(torch.tensor([0, 1]), torch.tensor([0.8, 0.5]))
    other = Composition(torch.tensor([2, 1]), torch.tensor([0.7, 0.3]))
    edits = MetaEdits(torch.tensor([[False, False], [True, False]]), torch.tensor([[False, False], [True, True]]))
    meta = Directions(torch.eye(3, 4), b_dec, torch.eye(3, 4))
    return edited_rows(row, own, other, edits, meta, preset)


def test_edited_rows_by_hand():
    b = torch.tensor([0.0, 0.0, 0.0, 0.2])
    unchanged, changed = edit_by_hand("difference", b)
    assert torch.allclose(unchanged, torch.tensor([1.6, 1.2, 0, 0]))
    expected = torch.tensor([0.0, 0.6 + 0.3 - 0.5, 0.7, 0.0])
    assert torch.allclose(changed, 2 * expected / expected.norm())
    unchanged, changed = edit_by_hand("rebuild", b)
    whole, expected = torch.tensor([0.8, 0.5, 0.0, 0.2]), torch.tensor([0.0, 0.3, 0.7, 0.2])
    assert torch.allclose(unchanged, 2 * whole / whole.norm())
    assert torch.allclose(changed, 2 * expected / expected.norm())
    unchanged, changed = edit_by_hand("script_compat", b)
    expected = torch.tensor([0.8 - 100, 0.6 + 100, 100.0, 0.0])
    assert torch.allclose(unchanged, torch.tensor([0.8, 0.6, 0, 0]))
    assert torch.allclose(changed, expected / expected.norm())


def test_a_composition_is_strongest_first_and_may_be_cut():
    codes = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3])
    assert Composition.of(codes).meta_latents.tolist() == [3, 4, 1]
    assert Composition.of(codes, 2).values.tolist() == [0.5, pytest.approx(0.3)]


def test_subsets_and_selectivity_by_hand():
    clean = {"job": torch.tensor([0.0, -2.0, -3.0]), "pet": torch.tensor([0.0, -1.0])}
    log_probs = {
        "job": torch.tensor([[0.0, -2, -3], [-3, 0, -3], [-3, 0, -3], [-3, -2, 0]]),
        "pet": torch.tensor([[0.0, -1], [0, -1], [-2, 0], [0, -1]]),
    }
    outcome = Outcome(log_probs, clean, {"job": 0, "pet": 0}, {"job": 1, "pet": 1})
    assert outcome.subsets.tolist() == [0, 1, 3, -1]  # nothing, job, both, job is neither's
    assert outcome.reached == {1, 3}
    assert outcome.changes.tolist() == [[0, 0], [5, 0], [5, 3], [3, 0]]
    # {job}: edit 1, 5 against 0; {pet}: edit 0, 0 against 0 (edit 2 has 3 against 5)
    assert outcome.selectivity() == (2.5, 0.0)
    metrics = outcome.metrics()
    assert metrics["reached_fraction"] == pytest.approx(2 / 3) and metrics["reached_proper_fraction"] == 0.5
    assert metrics["reached_all"] == 1 and metrics["selectivity_nats"] == 2.5


# ---- on a language model


@pytest.fixture(scope="module")
def lm(tiny_model) -> LanguageModel:
    return load_language_model(tiny_model)


@pytest.fixture(scope="module")
def dictionary(lm: LanguageModel) -> BatchTopK:
    method = BatchTopK(
        d_model=32, dict_size=64, k=4, use_enc_bias=False,
        enc_init_norm=None, threshold_rule="ema", threshold_ema_rate=0.1, aux="none",
        aux_coefficient=0.0, k_aux=4, lr=1e-3, betas=(0.9, 0.99), input_norm="token_std", seed=0,
        decoder_norm="before_step", dead_after_tokens=100, grad_clip=1.0,
        b_dec_init="zeros", warmup_steps=0, decay_fraction=0.0,
        path="auto",
    )  # fmt: skip
    method.threshold.fill_(0.5)
    with torch.no_grad():
        method.b_dec.add_(0.05)
        method.W_dec.mul_(torch.linspace(0.9, 1.1, 64)[:, None])
    return method.eval()


def question() -> Any:
    return SimpleNamespace(
        tokens=torch.tensor([0, 7, 20, 31, 12]), candidates=torch.tensor([5, 9, 40]), entity_position=2
    )


@pytest.mark.parametrize("splice", ["error_kept", "reconstruction"])
@pytest.mark.parametrize("unit_decoder", [False, True])
@torch.no_grad()
def test_an_edited_row_does_what_an_edited_dictionary_in_a_hook_does(lm, dictionary, splice, unit_decoder):
    asked, site = question(), "resid_pre.1"
    editor = Editor(dictionary, lm, site, splice, rows_per_forward=2)
    clean = editor.clean(asked)
    latent = int(clean.codes[2].argmax())
    rows = torch.randn(3, 32, generator=generator(0, "rows"))
    found = editor.with_rows(clean, latent, rows, unit_decoder)
    for row, log_probs in zip(rows, found, strict=True):
        W_dec = dictionary.W_dec.clone()
        if unit_decoder:
            W_dec = torch.nn.functional.normalize(W_dec, dim=1)
        W_dec[latent] = row

        def splice_in(x: Tensor, W_dec: Tensor = W_dec) -> Tensor:
            x_n, shift = dictionary.norm(x[0])
            codes = dictionary.encode(x_n).dense()
            edited = dictionary.norm.undo(codes @ W_dec + dictionary.b_dec, shift)
            error = x[0] - dictionary.reconstruct(x[0]) if splice == "error_kept" else 0
            return torch.cat([x[:, :1], (edited + error)[None, 1:]], 1)

        logits = lm.logits(asked.tokens[None], Edit(site, splice_in))[0, -1]
        torch.testing.assert_close(log_probs, logits.log_softmax(-1)[asked.candidates], atol=1e-4, rtol=1e-4)


def test_no_edit_is_no_change_where_the_error_is_kept(lm, dictionary):
    asked = question()
    editor = Editor(dictionary, lm, "resid_pre.1", "error_kept", 8)
    clean = editor.clean(asked)
    plain = lm.logits(asked.tokens[None])[0, -1].log_softmax(-1)[asked.candidates]
    torch.testing.assert_close(editor.unedited(clean)[0], plain)
    torch.testing.assert_close(editor.with_rows(clean, 3, dictionary.W_dec[3:4].detach())[0], plain)
