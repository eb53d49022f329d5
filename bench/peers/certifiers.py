"""The certifiers that are compared, this package's and other people's: each is an entry of `PEERS`.

An entry makes, for one network, a function ``holds(x, y, eps)``: x (B, *input), y (B,), eps (B,) float64; (B,) bool,
whether it certifies that every point within the l2 distance eps of x has class y. What is done once for a network is
done when that function is made.

Certifiers that know global norms alone share the rest: the product of the norms of all layers but the last, times eps,
is the radius at the last layer's input, and logit j gains at most ‖w_j - w_y‖ times that on logit y.
"""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import locallip_cuda as ll
from bench import paper_method
from locallip_cuda.nn import ClippedMaxMin, ClippedReLU, MaxMin

Holds = Callable[[Tensor, Tensor, Tensor], Tensor]
Make = Callable[[nn.Sequential, Tensor], Holds]

OWN = "locallip-cuda"
PUBLISHED_ITERATIONS = 2000
# of the published loop for the worst logits: more than it takes to end by itself in most samples
ROUNDS = 10
GRAM_ITERATIONS = 4
# ECLipsE takes eigenvalues of dense matrices with so many rows; beyond it is hours.
MOST_UNITS = 4096


@dataclass(frozen=True)
class Peer:
    """name: in the table.   distribution, module: what has to be installed, and what it is imported as; neither where
    nothing has.   proves: what its certificate is worth.   settings: what was chosen of what it leaves open.   make: of
    a network and one input (1, *input)."""

    name: str
    proves: str
    settings: str
    make: Make
    distribution: str = OWN
    module: str = "locallip_cuda"

    @property
    def is_proof(self) -> bool:
        return not self.proves.startswith("nothing")


# ---- this package ----


def local(guarantee: str, window: float = 1) -> Make:
    def make(model: nn.Sequential, _: Tensor) -> Holds:
        def holds(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
            certificate = ll.certify(model, x, eps, guarantee=guarantee, window=window)
            return certificate.certified & (certificate.prediction == y)

        return holds

    return make


def proved_global(window: float = 1) -> Make:
    def make(model: nn.Sequential, x: Tensor) -> Holds:
        norms = ll.ProvedNorms()

        def holds(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
            bounds = ll.global_bounds(model, x, eps, guarantee="deterministic", norms=norms, window=window)
            return bounds.margin(y) > 0

        holds(x, torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64))  # the norms
        return holds

    return make


# ---- other people's ----


def published(model: nn.Sequential, _: Tensor) -> Holds:
    def holds(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        bounds = paper_method.paper_bounds(model, x, eps, PUBLISHED_ITERATIONS)
        return bounds.worst_logits(y, ROUNDS).argmax(1) == y

    return holds


def crown(model: nn.Sequential, x: Tensor) -> Holds:
    let_auto_lirpa_import()
    from auto_LiRPA import BoundedModule, BoundedTensor
    from auto_LiRPA.perturbations import PerturbationLpNorm

    weights(model, (nn.ReLU,))
    bounded = BoundedModule(copy.deepcopy(model), torch.empty_like(x))

    classes = torch.eye(model[-1].out_features)

    def at(x: Tensor, y: Tensor, radius: float) -> Tensor:
        differences = classes[y].unsqueeze(1) - classes  # (B, K, K): logit y minus each
        rivals = differences[F.one_hot(y, len(classes)) == 0].view(len(y), -1, len(classes))
        ball = BoundedTensor(x, PerturbationLpNorm(norm=2, eps=radius))
        lower, _ = bounded.compute_bounds(x=(ball,), C=rivals, method="backward", bound_upper=False)
        return (lower > 0).all(1)

    def holds(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        certified = torch.zeros(len(x), dtype=torch.bool)
        for radius in eps.unique().tolist():  # it takes one radius at a time
            here = eps == radius
            certified[here] = at(x[here], y[here], radius)
        return certified

    return holds


def eclipse(model: nn.Sequential, x: Tensor) -> Holds:
    from eclipse_nn import LipConstEstimator

    *inner, last = dense(model, x, (nn.ReLU, ClippedReLU))
    gain = torch.zeros(len(last), len(last), dtype=torch.float64)
    for i, j in itertools.combinations(range(len(last)), 2):
        gain[i, j] = gain[j, i] = LipConstEstimator(weights=[*inner, last[i : i + 1] - last[j : j + 1]]).estimate(
            "ECLipsE_Fast"
        )
    return constant_rise(model, gain)


def torchlip(model: nn.Sequential, _: Tensor) -> Holds:
    from deel.torchlip.normalizers import DEFAULT_EPS_SPECTRAL, spectral_normalization
    from deel.torchlip.utils.lconv_norm import compute_lconv_coef

    def norm(layer: nn.Conv2d | nn.Linear) -> float:
        largest = float(spectral_normalization(layer.weight.flatten(1))[2]) + DEFAULT_EPS_SPECTRAL
        if isinstance(layer, nn.Linear):
            return largest
        return largest / float(compute_lconv_coef(layer.kernel_size, None, layer.stride))

    return product(model, norm)


def orthogonium(model: nn.Sequential, _: Tensor) -> Holds:
    from orthogonium.layers.conv.singular_values import get_conv_sv
    from orthogonium.layers.linear.ortho_linear import OrthoLinear

    def norm(layer: nn.Conv2d | nn.Linear) -> float:
        if isinstance(layer, nn.Linear):
            return float(OrthoLinear.singular_values(layer)[1])
        return float(get_conv_sv(layer, GRAM_ITERATIONS, return_stab_rank=False))

    return product(model, norm)


PEERS = (
    Peer("local, estimate", "nothing: norms from below", "", local("estimate")),
    Peer("local, probabilistic", "a proof, rounding counted; fails with 1e-9 a sample", "", local("probabilistic")),
    Peer("local, deterministic", "a proof, rounding counted", "", local("deterministic")),
    Peer(
        "local, composed, probabilistic",
        "a proof, rounding counted; fails with 1e-9 a sample",
        "window = inf",
        local("probabilistic", math.inf),
    ),
    Peer("global, deterministic", "a proof, rounding counted", "norms proved once", proved_global()),
    Peer(
        "global, composed, deterministic",
        "a proof, rounding counted",
        "window = inf; norms proved once",
        proved_global(math.inf),
    ),
    Peer(
        "published local bound",
        "nothing: norms from below",
        f"rendition in bench/paper_method.py; {PUBLISHED_ITERATIONS} power iterations a layer, float32",
        published,
    ),
    Peer(
        "auto_LiRPA, CROWN",
        "a proof in real arithmetic; computed in float32, rounding not counted",
        "norm 2, method backward, every intermediate bound by CROWN, slopes not optimised; takes ReLU alone",
        crown,
        "auto_LiRPA",
        "auto_LiRPA",
    ),
    Peer(
        "ECLipsE-Fast, global",
        "a proof in real arithmetic; computed in float64, rounding not counted",
        f"convolutions as dense matrices of up to {MOST_UNITS} rows and columns; a constant for every pair of classes",
        eclipse,
        "eclipse-nn",
        "eclipse_nn",
    ),
    Peer(
        "torchlip, global product",
        "nothing: norms of matrices from below, plus 1e-3",
        "normalizers.spectral_normalization (at most 20 power iterations) of the weight, a kernel's as a matrix "
        "divided by compute_lconv_coef",
        torchlip,
        "deel-torchlip",
        "deel.torchlip",
    ),
    Peer(
        "orthogonium, global product",
        "a proof in real arithmetic; computed in float32, rounding not counted",
        f"get_conv_sv with {GRAM_ITERATIONS} Gram iterations (of the convolution without its stride), "
        "OrthoLinear.singular_values",
        orthogonium,
        "orthogonium",
        "orthogonium",
    ),
)


# ---- what they share ----


def weights(model: nn.Sequential, activations: tuple[type[nn.Module], ...]) -> list[nn.Conv2d | nn.Linear]:
    """The layers with weights, in order. TypeError for others than those, Flatten and ``activations``."""
    for index, layer in enumerate(model):
        if not isinstance(layer, (nn.Conv2d, nn.Linear, nn.Flatten, *activations)):
            names = ", ".join(kind.__name__ for kind in activations)
            raise TypeError(f"takes {names} alone, got {type(layer).__name__} as layer {index}")
    return [layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]


def product(model: nn.Sequential, norm: Callable[[nn.Conv2d | nn.Linear], float]) -> Holds:
    """Certificates of the product of the norms of all layers but the last."""
    *inner, last = weights(model, (nn.ReLU, ClippedReLU, MaxMin, ClippedMaxMin))
    constant = math.prod(norm(layer) for layer in inner)
    rows = last.weight.detach().double()
    return constant_rise(model, constant * torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist"))


def constant_rise(model: nn.Sequential, gain: Tensor) -> Holds:
    """Certificates where logit j gains at most gain[y, j], (K, K), times eps on logit y."""

    def holds(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
        logits = model(x).double()
        worst = logits + eps.unsqueeze(1) * gain[y]
        best_rival = worst.scatter(1, y.unsqueeze(1), -math.inf).amax(1)
        return logits.gather(1, y.unsqueeze(1))[:, 0] > best_rival

    return holds


def dense(model: nn.Sequential, x: Tensor, activations: tuple[type[nn.Module], ...]) -> list[Tensor]:
    """The layers as float64 matrices (m, n): their action on unit vectors. ValueError where one is too large."""
    matrices = []
    weights(model, activations)
    for layer in model:
        below, x = x, layer(x)
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if max(below.numel(), x.numel()) > MOST_UNITS:
            raise ValueError(f"takes dense layers alone, of which one would be {x.numel()} x {below.numel()}")
        units = torch.eye(below.numel(), dtype=torch.float64).view(-1, *below.shape[1:])
        linear = copy.deepcopy(layer).double()
        linear.bias = None
        matrices.append(linear(units).flatten(1).T.contiguous())
    return matrices


def let_auto_lirpa_import() -> None:
    """Put what auto_LiRPA 0.3 (for torch before 1.13 and NumPy before 2) looks for, where it looks, if it is gone."""
    import numpy as np

    symbolic_helper = importlib.import_module("torch.onnx.symbolic_helper")  # torch.onnx's attribute is another module
    if "numpy.lib.arraysetops" not in sys.modules and not hasattr(np.lib, "arraysetops"):
        sys.modules["numpy.lib.arraysetops"] = types.ModuleType("numpy.lib.arraysetops")
        sys.modules["numpy.lib.arraysetops"].isin = np.isin  # type: ignore[attr-defined]
    if not hasattr(symbolic_helper, "_set_opset_version"):
        from torch.onnx._internal.torchscript_exporter._globals import GLOBALS

        symbolic_helper._set_opset_version = lambda version: setattr(GLOBALS, "export_onnx_opset_version", version)
    if not hasattr(torch._C.Node, "__getitem__"):
        torch._C.Node.__getitem__ = lambda node, name: getattr(node, node.kindOf(name))(name)
