"""``python -m locallip_cuda`` is the command ``locallip``."""

import sys

from .cli import main

sys.exit(main())
