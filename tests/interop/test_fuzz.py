"""Whatever a folder of a dictionary holds: it is read and works, or one message names it. Nothing raw, nothing slow."""

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.artifacts import Store
from core.errors import UserError
from core.interop import crosscoder, saelens
from core.interop.loading import load
from core.methods.batchtopk import BatchTopK
from core.methods.pretrained import Pretrained
from core.methods.saved import load_dictionary, save_dictionary
from core.methods.settings import BEFORE
from core.methods.stitched import Stitched
from tests.test_reading import FUZZ, mutations

D, M = 4, 6
X = torch.linspace(-2, 2, 3 * D).view(3, D)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def some(activation: Any) -> Pretrained:
    rule = {"topk": {"k": 2}, "jumprelu": {"threshold": torch.rand(M)}, "relu": {}}[activation]
    W = numbers(M, D)
    options: dict[str, Any] = {"activation": activation, "subtract_b_dec": True, **rule}
    return Pretrained.of(W, W.clone(), numbers(M), numbers(D), **options)


def put_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def put_saelens(folder: Path) -> None:
    saelens.write(some("topk"), folder, site="resid_post.3", model="gpt2")
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["metadata"] |= {"context_size": 128, "dataset_path": "a/b", "exclude_special_tokens": [0, 2]}
    put_json(folder / "cfg.json", cfg | {"normalize_activations": "expected_average_only_in"})
    put_json(folder / "activation_scaler.json", {"scaling_factor": 2.0})


def put_old_saelens(folder: Path) -> None:
    saelens.write(some("jumprelu"), folder)
    put_json(
        folder / "cfg.json",
        {"architecture": "jumprelu", "d_in": D, "d_sae": M, "hook_point": "blocks.{layer}.hook_resid_pre",
         "hook_point_layer": 2, "normalize_activations": "layer_norm", "model_name": "gpt2-small",
         "model_from_pretrained_kwargs": {"center_writing_weights": False}, "seqpos_slice": [5, -5]},
    )  # fmt: skip


def put_gemma(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    arrays: dict[str, Any] = {name: numbers(*shape).numpy() for name, shape in shapes.items()}
    np.savez(folder / "params.npz", threshold=np.full(M, 0.5, np.float32), **arrays)


def put_dictionary_learning(folder: Path) -> None:
    trainer = {
        "dict_class": "AutoEncoderTopK",
        "k": 2,
        "activation_dim": D,
        "dict_size": M,
        "layer": 3,
        "lm_name": "a/b",
    }
    buffer = {"io": "out", "ctx_len": 128, "remove_bos": True}
    put_json(folder / "config.json", {"trainer": {**trainer, "submodule_name": "resid_post_layer_3"}, "buffer": buffer})
    tensors = {"encoder.weight": numbers(M, D), "encoder.bias": numbers(M), "decoder.weight": numbers(D, M)}
    torch.save(tensors | {"b_dec": numbers(D), "k": torch.tensor(2)}, folder / "ae.pt")


def put_jumprelu(folder: Path) -> None:
    put_json(folder / "config.json", {"trainer": {"dict_class": "JumpReluAutoEncoder"}})
    tensors = {"W_enc": numbers(D, M), "W_dec": numbers(M, D), "b_enc": numbers(M), "b_dec": numbers(D)}
    torch.save(tensors | {"threshold": torch.rand(M)}, folder / "ae.pt")


def put_sparsify(folder: Path) -> None:
    put_json(folder / "cfg.json", {"d_in": D, "k": 2, "num_latents": M, "activation": "topk", "transcode": False})
    put_json(folder.parent / "config.json", {"sae": {}, "model": "a/b", "ctx_len": 64, "exclude_tokens": [1]})
    tensors = {"encoder.weight": numbers(M, D), "encoder.bias": numbers(M), "W_dec": numbers(M, D), "b_dec": numbers(D)}
    save_file(tensors, folder / "sae.safetensors")


def put_meta(folder: Path) -> None:
    put_json(
        folder / "Config.json",
        {"act_size": D, "dict_size": M, "top_k": 2, "sae_type": "topk", "threshold": 0.1, "lr": 1e-3, "seed": 49,
         "hook_point": "blocks.8.hook_resid_pre", "input_unit_norm": False, "beta1": 0.9, "batch_size": 64},
    )  # fmt: skip
    tensors = {"W_enc": numbers(D, M), "W_dec": numbers(M, D), "b_enc": numbers(M), "b_dec": numbers(D)}
    torch.save(tensors, folder / "SAE.pt")


def our_own() -> BatchTopK:
    method = BatchTopK(
        d_model=D, dict_size=M, k=2, use_enc_bias=False, threshold_rule="ema", threshold_ema_rate=0.5, aux="none",
        aux_coefficient=0.0, k_aux=1, lr=1e-3, betas=(0.9, 0.99), input_norm="token_std", seed=0, decoder_norm="none",
        dead_after_tokens=64, grad_clip=1.0, warmup_steps=0, decay_fraction=0.0, path="auto", **BEFORE,
    )  # fmt: skip
    method.threshold.fill_(0.1)
    return method.eval()


def put_native(folder: Path) -> None:
    save_dictionary(our_own(), {"steps": 1}, folder)


def put_stitched(folder: Path) -> None:
    parts = [(some("relu"), torch.arange(M) < 3), (our_own(), torch.arange(M) > 2)]
    save_dictionary(Stitched.of(parts, torch.zeros(D)), {}, folder)


def put_stored(folder: Path) -> None:
    """A cell's folder, and beside it the store that it points to."""
    batches = {"stream": {"site": "resid_post.3"}, "model": {"source": "a/b", "revision": "c", "dtype": "float32"}}
    store = Store(folder.parent / "store")
    stored = store.put(
        "dictionary", {"source": {"batches": batches}}, lambda place: save_dictionary(our_own(), {}, place)
    )
    put_json(folder / "dictionary.json", {"folder": str(stored), "class": "unused"})


PUT: dict[str, Callable[[Path], None]] = {
    "saelens": put_saelens, "older saelens": put_old_saelens, "gemma scope": put_gemma,
    "dictionary_learning": put_dictionary_learning, "jumprelu": put_jumprelu, "sparsify": put_sparsify,
    "meta": put_meta, "native": put_native, "stitched": put_stitched, "stored": put_stored,
}  # fmt: skip
SITES = {"meta": "resid_pre.8", "older saelens": "resid_pre.2"}


def read(name: str, folder: Path) -> Tensor | None:
    """The reconstruction of `X`; None where a message says why there is none."""
    started = time.monotonic()
    try:
        return load(D, str(folder), site=SITES.get(name, "resid_post.3")).reconstruct(X)
    except UserError as error:
        text = str(error)
        named = "method." in text or str(folder.parent) in text or "stream.site" in text
        assert len(text) < 1500 and named, text[:300]
        return None
    finally:
        assert time.monotonic() - started < 5


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, bytes]]]:
    """The folder of a format, and the content of every file there by name."""
    made: dict[str, tuple[Path, dict[str, bytes]]] = {}

    def get(name: str) -> tuple[Path, dict[str, bytes]]:
        if name not in made:
            root = tmp_path_factory.mktemp("fuzz") / "run"
            PUT[name](root / "layers.3")
            files = {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}
            made[name] = root, {file: content for file, content in files.items() if ".lock" not in file}
        root, files = made[name]
        for file, content in files.items():
            path = root / file
            if path.is_dir():
                shutil.rmtree(path)
            if not path.is_file() or path.read_bytes() != content:
                path.write_bytes(content)
        return root / "layers.3", files

    return get


@pytest.mark.parametrize("name", PUT)
def test_what_is_mutated_below_is_read_as_it_stands(name: str, originals: Any) -> None:
    folder, _ = originals(name)
    x_hat = read(name, folder)
    assert x_hat is not None and x_hat.isfinite().all() and not torch.equal(x_hat, X)


@pytest.mark.parametrize("name", PUT)
@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_damaged_or_swapped_files_are_one_message(name: str, data: st.DataObject, originals: Any) -> None:
    folder, files = originals(name)
    root, file = folder.parent, data.draw(st.sampled_from(sorted(files)))
    others = [content for other, content in files.items() if other != file] or [b"{}"]
    content = data.draw(
        st.one_of(
            mutations(files[file]), mutations(files[file]), mutations(files[file]), st.sampled_from(others),
            st.sampled_from([POINTER, b"", b"{}", b"[]", b"<html></html>", b"[" * 100_000, None]),
        )
    )  # fmt: skip
    (root / file).unlink()
    if content is None:
        (root / file).mkdir()
    else:
        (root / file).write_bytes(content)
    x_hat = read(name, folder)
    assert x_hat is None or x_hat.shape == X.shape


HOSTILE = [
    None, True, False, 0, 1, -1, 2.5, 1e400, float("nan"), -float("inf"), 10**400, "", "text", "\ud83d", "x" * 5000, [],
    {}, [None], [1, 2], {"a": 1}, [[[[]]]], 2, 3, D, M, 10**9, 10**18, "layers.3.mlp", "a\nb", "../..", "\x00",
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON value."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(deeper for key, value in inner for deeper in places(value, (*path, key)))]


def changed(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("name", [name for name in PUT if name != "gemma scope"])
@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_field_of_another_type_or_size_is_one_message_or_means_something(
    name: str, data: st.DataObject, originals: Any
) -> None:
    folder, files = originals(name)
    file = data.draw(st.sampled_from([file for file in sorted(files) if file.endswith(".json")]))
    content = json.loads(files[file])
    path = data.draw(st.sampled_from(places(content)))
    value = data.draw(st.sampled_from(HOSTILE))
    text = json.dumps(changed(content, path, value)).replace(str(10**400), "9" * 5000)
    (folder.parent / file).write_text(text)
    if name == "stored":
        (folder.parent / "store/dictionary").mkdir(exist_ok=True)
    x_hat = read(name, folder)
    assert x_hat is None or x_hat.shape == X.shape


def tensors_in(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    if path.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(path).items()}
    return load_file(path)


def put_tensors(path: Path, tensors: dict[str, Any]) -> None:
    if path.suffix == ".pt":
        torch.save(tensors, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "turned": lambda t: t.T if t.ndim == 2 else t[None],
    "shorter": lambda t: t[1:] if t.ndim else t[None],
    "longer": lambda t: torch.cat([t, t]) if t.ndim else t.repeat(2),
    "flat": lambda t: t.flatten(),
    "empty": lambda t: t.flatten()[:0],
    "nan": lambda t: torch.full_like(t, torch.nan) if t.is_floating_point() else t - 5,
    "infinite": lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t + 10**6,
    "beyond fp32": lambda t: t.double() * 1e200,
    "whole": lambda t: t.long(),
    "bool": lambda t: t.bool(),
    "bytes": lambda t: t.to(torch.int8),
}
ONLY_PT: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda t: t.to_sparse(),
    "meta": lambda t: t.to("meta"),
    "expanded": lambda t: t.new_zeros(()).expand(2**17, 2**17),
    "complex": lambda t: t.to(torch.complex64),
    "a number": lambda t: 2.5,
    "a text": lambda t: "text",
    "nested": lambda t: {"in": t},
    "a list": lambda t: [t],
    "none": lambda t: None,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PUT)
@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_changed_tensor_is_one_message_or_works(name: str, data: st.DataObject, originals: Any) -> None:
    """Names of wrapped modules are taken for the module's own; what cannot be right is refused."""
    folder, files = originals(name)
    weights = [file for file in files if not file.endswith(".json")]
    path = folder.parent / data.draw(st.sampled_from(sorted(weights)))
    tensors: dict[str, Any] = dict(tensors_in(path))
    tensor = data.draw(st.sampled_from(sorted(tensors)))
    changes = CHANGES | (ONLY_PT if path.suffix == ".pt" else {})
    how = data.draw(st.sampled_from(["drop", "rename", "wrap", "swap", *changes]))
    whole = tensors.pop(tensor)
    if how == "rename":
        tensors[data.draw(st.sampled_from(["", "x", tensor.upper() + "_", "module", "W_skip"]))] = whole
    elif how == "wrap":
        tensors[f"_orig_mod.{tensor}"] = whole
    elif how == "swap" and tensors:
        other = data.draw(st.sampled_from(sorted(tensors)))
        tensors[tensor], tensors[other] = tensors[other].clone(), whole
    elif how in changes:
        tensors[tensor] = changes[how](whole)
    put_tensors(path, tensors)
    x_hat = read(name, folder)
    assert x_hat is None or (x_hat.shape == X.shape and x_hat.isfinite().all())
    if how in ("drop", "nan", "infinite", "beyond fp32", "empty") and whole.ndim == 2:
        assert x_hat is None
    if how == "wrap" and "dictionary.json" not in str(files) and name not in ("native", "stitched"):
        assert x_hat is not None


@pytest.mark.parametrize("layout", ["modules", "matrices"])
@pytest.mark.slow
@FUZZ
@given(data=st.data())
def test_a_mutated_crosscoder_is_one_message_or_whole(layout: str, data: st.DataObject, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {
        "modules": {"encoder.weight": numbers(2, D, M), "encoder.bias": numbers(M), "decoder.weight": numbers(2, M, D),
                    "decoder.bias": numbers(2, D), "k": torch.tensor(3), "threshold": torch.tensor(0.5)},
        "matrices": {"W_enc": numbers(2, D, M), "W_dec": numbers(M, 2, D), "b_enc": numbers(M), "b_dec": numbers(2, D)},
    }[layout]  # fmt: skip
    path = tmp_path / "model.pt"
    if data.draw(st.booleans()):
        buffer = io.BytesIO()
        torch.save(tensors, buffer)
        path.write_bytes(data.draw(mutations(buffer.getvalue())))
    else:
        name = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(["drop", *CHANGES, *ONLY_PT]))
        whole = tensors.pop(name)
        if how != "drop":
            tensors[name] = (CHANGES | ONLY_PT)[how](whole)
        torch.save(tensors, path)
    try:
        read_back = crosscoder.read(path, [1, 1] if layout == "matrices" else None)
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert read_back.W_enc.shape == read_back.W_dec.shape == (M, 2, D)
        assert read_back.threshold >= 0


@pytest.mark.parametrize("what", ["weights.safetensors", "manifest.json"])
def test_files_in_the_store_that_have_changed_since_are_refused(what: str, originals: Any) -> None:
    folder, files = originals("stored")
    stored = Path(json.loads(files["layers.3/dictionary.json"])["folder"])
    content = bytearray((stored / what).read_bytes())
    content[-3] ^= 1
    (stored / what).write_bytes(bytes(content))
    with pytest.raises(UserError, match=rf"{what}.*has changed since it was written"):
        load_dictionary(stored)
    with pytest.raises(UserError, match=rf"{what}.*has changed since it was written"):
        load(D, str(folder))
