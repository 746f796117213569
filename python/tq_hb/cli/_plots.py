"""What the plots of the commands share."""

from __future__ import annotations

import io
from typing import Any


def png(figure: Any) -> bytes:
    """Return a figure's file, the same with every version of matplotlib that draws the same."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()
