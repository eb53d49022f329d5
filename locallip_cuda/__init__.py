"""Local Lipschitz bounds for training and certifying neural networks; see README.md."""

import pkgutil

# From the repository's root the source tree shadows an installed package: its compiled extension is found all the same.
__path__ = pkgutil.extend_path(__path__, __name__)

from . import losses, nn, testing
from .bounds import LocalBounds, ProvedBounds, global_bounds, local_bounds
from .build_info import build_info
from .certify import Certificate, certified_radius, certify
from .checked import Checked, checked
from .interchange import export, from_onnx
from .norms.masked_norm import NormBound, masked_norm, masked_norm_bound
from .propagation import rules
from .propagation.global_proof import ProvedNorms
from .propagation.graph import UnsupportedModuleError
from .propagation.rules import rule
from .propagation.training_norms import TrainingNorms

__all__ = [
    "Certificate",
    "Checked",
    "LocalBounds",
    "NormBound",
    "ProvedBounds",
    "ProvedNorms",
    "TrainingNorms",
    "UnsupportedModuleError",
    "build_info",
    "certified_radius",
    "certify",
    "checked",
    "export",
    "from_onnx",
    "global_bounds",
    "local_bounds",
    "losses",
    "masked_norm",
    "masked_norm_bound",
    "nn",
    "rule",
    "rules",
    "testing",
]
