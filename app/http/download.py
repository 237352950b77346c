"""A file that the browser stores."""
from __future__ import annotations

import json
from pathlib import PurePath
from urllib.parse import quote

from fastapi.responses import Response


def download(content: str | bytes, name: str, kind: str = "text/plain") -> Response:
    """name: in any script (RFC 6266); a browser that does not know that gets a plain one with the same ending."""
    plain = name if name.isascii() else f"conversation{PurePath(name).suffix}"
    return Response(content, media_type=kind, headers={
        "content-disposition": f"attachment; filename={json.dumps(plain)}; filename*=UTF-8''{quote(name)}"})
