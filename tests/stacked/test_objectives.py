import pytest
import torch
from torch import Tensor

from core.stacked.coders import LinearCoder, MLPCoder
from core.stacked.objectives import KnownCodes, KnownSparseCodes
from core.synthetic.sparse_codes import SparseCodeLaw


@pytest.mark.parametrize("width", [None, 6])
def test_known_codes_given_as_the_active_ones_have_the_loss_and_the_gradients_of_dense_ones(width: int | None):
    law, g = SparseCodeLaw(N=12, M=5, K=2), torch.Generator().manual_seed(0)
    indices, values = law.active(20, g)
    indices[:, 0] = torch.where(indices[:, 0] == 3, (indices[:, 1] + 1) % 12, indices[:, 0])  # code 3 rare or silent
    S = torch.zeros(20, 12).scatter_(1, indices, values)
    X = (S @ law.dictionary(0)).expand(3, -1, -1)

    def dense(step: int) -> tuple[Tensor, Tensor]:
        return X, S[None]

    def sparse(step: int) -> tuple[Tensor, Tensor, Tensor]:
        return X, indices, values

    found = []
    for objective in (KnownCodes(dense), KnownSparseCodes(sparse)):
        coder = MLPCoder(range(3), 5, 12, width, True) if width else LinearCoder(range(3), 5, 12, True)
        with torch.no_grad():
            (coder.b_2 if isinstance(coder, MLPCoder) else coder.b_enc)[:, :, 7] = -100  # a dead unit
            objective.gradients(coder, 0)
        found.append([objective.loss(), *(p.grad for p in coder.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6) and bool(b.isfinite().all()) and bool(b.abs().sum() > 0)
