"""``python -m vpt`` is the same as ``vpt``."""

import sys

from vpt.cli import main

sys.exit(main())
