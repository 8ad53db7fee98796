"""HTTP requests to servers of this machine, past the proxy that http_proxy may name for others. Torch-free.

A proxy does not reach 127.0.0.1 of another machine, and would be told the server's key.
"""

import urllib.request
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from mswift.infer.server.listen import is_own


def urlopen(request: urllib.request.Request, timeout: float | None = None, *, is_ours: bool = False) -> Any:
    """As urllib's, by the environment's proxy, but for an address of this machine; is_ours: it is one, by any name."""
    if is_ours or is_own(urlsplit(request.full_url).hostname or ""):
        return _direct().open(request, timeout=timeout)
    return urllib.request.urlopen(request, timeout=timeout)


@cache
def _direct() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))
