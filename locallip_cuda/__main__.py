"""``python -m locallip_cuda`` is the command ``locallip``."""

import sys

from .experiments.cli import main

sys.exit(main())
