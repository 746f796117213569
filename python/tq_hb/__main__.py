"""``python -m tq_hb`` is ``tq-hb``."""

from __future__ import annotations

import sys

from tq_hb.cli import main

if __name__ == "__main__":
    sys.exit(main())
