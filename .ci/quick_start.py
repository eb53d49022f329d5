"""Runs the quick start, docs/quick_start.md, with the package as it is installed. Run it outside of the checkout."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import locallip_cuda

if not Path(locallip_cuda.__file__).is_relative_to(sys.prefix):
    raise SystemExit(f"locallip_cuda is {locallip_cuda.__file__}, want the one that is installed in {sys.prefix}")
page = Path(__file__).resolve().parent.parent / "docs" / "quick_start.md"
exec("".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)))
