"""The chat page's JavaScript, run by Node.js where it is installed."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "mswift" / "infer" / "app" / "page"
NODE = shutil.which("node") or shutil.which("nodejs")
needs_node = pytest.mark.skipif(NODE is None, reason="no Node.js here (node), which runs the page's JavaScript")

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "**<iframe srcdoc='<script>1</script>'>**",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](java\tscript:alert(1))",
    "[a](&#106;avascript:alert(1))",
    "[a]( javascript:alert(1))",
    "[a](data:text/html,<script>1</script>)",
    "[a](vbscript:x)",
    "[a](file:///etc/passwd)",
    "[a](//evil.example/x)",
    "[a](https:javascript:alert(1))",
    '[a](https://x.example/" onmouseover="alert(1))',
    "![a](https://evil.example/steal?x)",
    "![a](x)",
    '<a href="javascript:1">x</a>',
    "```html\n</code></pre><script>1</script>\n```",
    "`</code><script>1</script>`",
    "| <b>a</b> | b |\n|---|---|\n| <script>1</script> | [x](javascript:1) |",
    "> <script>1</script>\n- <style>*{display:none}</style>",
    "# <h1 onclick=x>",
    "https://a.example/<script>",
    "[__proto__](https://a.example)",
    "<!--<script>-->\u2028\u202e",
    "{{constructor.constructor('alert(1)')()}}",
    "\x00<\x00script>",
]
"""What a model may write."""


def run(program: str, given: Any, *arguments: str) -> Any:
    """What a program of this folder prints, as JSON; `given` is its input."""
    assert NODE is not None
    text = json.dumps(given)
    argv = [NODE, str(HERE / program), str(PAGE), *arguments]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
