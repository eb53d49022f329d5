"""The norm of weights in a row with masks between them: against its twin, dense matrices, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import DEVICES, generator, matrix
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import locallip_cuda as ll
from locallip_cuda import ops
from locallip_cuda.norms import iteration
from locallip_cuda.norms.linear import Composed, Convolution, Dense, Masking, Reshape, Scaling
from locallip_cuda.ops import reference

pytestmark = pytest.mark.parametrize("device", DEVICES)
Case = dict[str, Any]


def problem(seed: int, kinds: str, density: float, dtype: torch.dtype, device: str, batch: int = 3) -> Case:
    """kinds: of each weight, c for a convolution, s for one with a stride, g with groups, d for a dense one."""
    g = generator(seed)
    sizes: list[int] = [2, 6, 5] if kinds[0] != "d" else [7]
    input_size, weights, masks, numbers = list(sizes), [], [], []
    for k, kind in enumerate(kinds):
        if k:
            if kind == "d":
                sizes = [math.prod(sizes)]
            mask = torch.rand(1 if seed % 3 == 0 and k == 1 else batch, *sizes, generator=g) < density
            masks.append(mask)
        if kind == "d":
            weights.append(torch.randn(5 + k, sizes[0], generator=g, dtype=torch.float64))
            sizes = [5 + k]
            numbers.append(([1, 1], [0, 0], [1, 1], 1))
            continue
        groups, stride = (2 if kind == "g" else 1), (2 if kind == "s" else 1)
        weights.append(torch.randn(4, sizes[0] // groups, 3, 2, generator=g, dtype=torch.float64))
        conv = ([stride, 1], [1, 1], [1, 2 if kind == "g" else 1], groups)
        numbers.append(conv)
        sizes = list(reference.affine(torch.zeros(1, *sizes).double(), weights[-1], None, *conv).shape[1:])
    given = {
        "weights": [w.to(device, dtype) for w in weights],
        "masks": [m.to(device) for m in masks],
        "row_mask": (torch.rand(batch, *sizes, generator=g) < density).to(device) if seed % 2 else None,
        "col_mask": (torch.rand(batch, *input_size, generator=g) < density).to(device) if seed % 5 else None,
        "start": torch.randn(1, *input_size, generator=g, dtype=torch.float64).to(device, dtype) if seed % 7 else None,
        "input_shape": [batch, *input_size],
    }
    names = ("stride", "padding", "dilation")
    given |= {name: [n for own in numbers for n in own[i]] for i, name in enumerate(names)}
    return given | {"groups": [own[3] for own in numbers]}


def dense(given: Case, b: int) -> Tensor:
    """The masked product of sample ``b`` as one matrix."""
    sizes, product = tuple(given["input_shape"][1:]), None
    for k, weight in enumerate(given["weights"]):
        pair = slice(2 * k, 2 * k + 2)
        conv = {name: given[name][pair] for name in ("stride", "padding", "dilation")} | {"groups": given["groups"][k]}
        own = matrix(weight.cpu().double(), sizes, **conv) if weight.dim() == 4 else weight.cpu().double()
        if product is None:
            columns = given["col_mask"]
            product = own if columns is None else own * columns[b].flatten().cpu()
        else:
            product = own @ product
        if k < len(given["masks"]):
            mask = given["masks"][k]
            sizes = tuple(mask.shape[1:])
            product = product * mask[min(b, len(mask) - 1)].flatten().cpu()[:, None]
    assert product is not None
    rows = given["row_mask"]
    return product if rows is None else product * rows[b].flatten().cpu()[:, None]


KINDS = ["dd", "cd", "cc", "ccd", "sgd", "ddd", "csdd"]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    st.sampled_from([0, 2, 5, 20]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_it_is_its_twin(
    device: str, seed: int, kinds: str, density: float, iterations: int, dtype: torch.dtype
) -> None:
    given = problem(seed, kinds, density, dtype, device)
    sigma, right, left = ops.chain_norm(**given, iterations=iterations)
    expected, *_ = reference.chain_norm(**given, iterations=iterations)
    tolerance = {"rtol": 2e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    if iterations == 20 and dtype == torch.float64:
        tolerance["rtol"] = 1e-5  # past a restart, of which rounding decides where it goes
    torch.testing.assert_close(sigma, expected.detach(), **tolerance)
    true = torch.stack([torch.linalg.matrix_norm(dense(given, b).double(), 2) for b in range(3)]).to(device)
    slack = 1e-4 if dtype == torch.float32 else 1e-10
    assert (sigma <= true * (1 + slack) + 1e-9).all()
    if iterations == 20:
        assert (sigma >= true * (1 - 1e-2) - 1e-6).all()
    alive = true > 1e-9
    for vector in (right, left):
        torch.testing.assert_close(vector.flatten(1).norm(dim=1)[alive], torch.ones_like(sigma)[alive], **tolerance)
    assert (sigma[~alive] <= 1e-9).all()


@pytest.mark.parametrize("kinds", KINDS)
def test_gradients_are_analytic(kinds: str, device: str) -> None:
    given = problem(11, kinds, 0.8, torch.float64, device)
    weights = [w.requires_grad_() for w in given.pop("weights")]
    assert torch.autograd.gradcheck(
        lambda *w: ops.chain_norm(list(w), **given, iterations=40)[0], weights, fast_mode=True, atol=1e-5, rtol=1e-4
    )
    factor = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, device=device)
    ours = torch.autograd.grad((ops.chain_norm(weights, **given, iterations=6)[0] * factor).sum(), weights)
    twin = torch.autograd.grad((reference.chain_norm(weights, **given, iterations=6)[0] * factor).sum(), weights)
    for one, other in zip(ours, twin, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kinds", ["dd", "ccd"])
def test_opcheck(kinds: str, device: str) -> None:
    given = problem(11, kinds, 0.8, torch.float64, device)
    given["weights"] = [w.requires_grad_() for w in given["weights"]]
    torch.library.opcheck(torch.ops.locallip_cuda.chain_norm, (*given.values(), 3, False))


def test_an_empty_mask_and_an_empty_batch(device: str) -> None:
    given = problem(11, "cd", 0.8, torch.float64, device)
    given["masks"][0][1] = False
    given["weights"] = [w.requires_grad_() for w in given["weights"]]
    sigma, right, left = ops.chain_norm(**given, iterations=4)
    assert sigma[1] == 0 and not right[1].any() and not left[1].any() and (sigma[[0, 2]] > 0).all()
    gradients = torch.autograd.grad(sigma[1], given["weights"])
    assert not any(g.any() for g in gradients)
    empty = given | {"input_shape": [0, *given["input_shape"][1:]], "row_mask": None, "col_mask": None, "start": None}
    empty["masks"] = [mask[:0] for mask in given["masks"]]
    sigma = ops.chain_norm(**empty, iterations=4)[0]
    assert sigma.shape == (0,)
    assert all(not g.any() for g in torch.autograd.grad(sigma.sum(), given["weights"]))


def test_a_weight_that_is_no_number_is_seen_behind_its_mask(device: str) -> None:
    given = problem(11, "ccd", 0.8, torch.float64, device)
    given["masks"][0][:, 0] = False
    given["weights"][1][0, 0, 0, 0] = math.nan
    assert ops.chain_norm(**given, iterations=4)[0].isnan().all()


def test_single_precision_is_no_tf32_and_samples_are_by_themselves(device: str) -> None:
    """In groups of samples as many as the cache holds, or all."""
    given = problem(11, "ccd", 0.8, torch.float32, device, batch=70)
    whole = ops.chain_norm(**given, iterations=15)[0]
    for b in (0, 33, 69):
        one = given | {"input_shape": [1, *given["input_shape"][1:]]}
        one["masks"] = [m if len(m) == 1 else m[b : b + 1] for m in given["masks"]]
        one |= {name: None if given[name] is None else given[name][b : b + 1] for name in ("row_mask", "col_mask")}
        torch.testing.assert_close(ops.chain_norm(**one, iterations=15)[0][0], whole[b], rtol=2e-4, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks": []}, "masks: got 0, want 1"),
        ({"weights": "first"}, "weights: got 1, want two or more"),
        ({"groups": [1]}, "groups: got"),
        ({"stride": [1, 1]}, "stride, padding, dilation: got"),
        ({"iterations": -1}, "iterations: got -1"),
        ({"masks": "wrong"}, "masks: got shape"),
        ({"row_mask": torch.ones(3, 2, dtype=torch.bool)}, "row_mask: got"),
    ],
)
def test_what_does_not_fit(changes: Case, message: str, device: str) -> None:
    given = problem(11, "cd", 0.8, torch.float64, device) | {"iterations": 3}
    changes = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in changes.items()}
    if changes.get("weights") == "first":
        changes = {"weights": given["weights"][:1]}
    if changes.get("masks") == "wrong":
        changes = {"masks": [given["masks"][0][:, 1:]]}
    with pytest.raises(RuntimeError, match=message):
        ops.chain_norm(**given | changes)


def test_which_maps_it_serves(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = ops.chain_norm

    def noted(weights: list[Tensor], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(len(weights))
        return real(weights, *args)

    monkeypatch.setattr(ops, "chain_norm", noted)
    g = generator(3)
    conv = Convolution(torch.randn(3, 2, 3, 3, generator=g).double().to(device), [2, 4, 4], [1, 1], [1, 1], [1, 1], 1)
    dense = Dense(torch.randn(5, 48, generator=g).double().to(device))
    last = Dense(torch.randn(4, 5, generator=g).double().to(device))
    like = dense.weight
    mask = Masking((torch.rand(2, 3, 4, 4, generator=g) < 0.7).to(device), like)
    flat = Reshape([3, 4, 4], [48], like)
    scaling = Scaling(torch.rand(5, generator=g).double().to(device), [5])
    for maps, served in (([conv, mask, flat, dense, last], [3]), ([conv, mask, flat, dense, scaling, last], [])):
        calls.clear()
        sigma = iteration.iterated_norm(Composed(maps), None, None, 2, None, 30)[0]
        other = iteration._of_any(Composed(maps), None, None, 2, None, 30)[0]
        assert calls == served
        torch.testing.assert_close(sigma, other, rtol=1e-9, atol=1e-9)


def test_bounds_of_a_network_use_it(device: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv1d(2, 3, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv1d(3, 4, 2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(28, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3),
    ).double().to(device)  # fmt: skip
    x = torch.rand(4, 2, 8, dtype=torch.float64, device=device)
    b = ll.local_bounds(model, x, 0.1, window=math.inf, iterations=40)
    assert len(b.composed) == 3 and (b.composed_closeness > 0.999).all() and (b.composed_closeness < 1 + 1e-9).all()
    gradients = torch.autograd.grad(b.radius.sum(), [model[0].weight, model[2].weight, model[5].weight])
    assert all(bool(g.any()) for g in gradients)
