"""Images without a Dockerfile: the Debian base image with Python, and the pause image of pods."""

from __future__ import annotations

import hashlib
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from scripts.cluster.archive import write_archive, write_single_file_layer
from scripts.cluster.console import ClusterError, say

SUITE = "bookworm"
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
MMDEBSTRAP = (
    "mmdebstrap",
    "--mode=root",
    "--variant=minbase",
    f"--include={BASE_PACKAGES}",
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
    "--dpkgopt=path-exclude=/usr/share/locale/*",
    # An environment below /root may be mounted into pods that do not run as root.
    '--customize-hook=chmod 0755 "$1/root"',
    SUITE,
)


@dataclass(frozen=True)
class Image:
    """An image as a docker-archive on disk, with its name after loading."""

    reference: str
    archive: Path


def base_image(images: Path) -> Image:
    """Debian with Python, built with mmdebstrap (about a minute) unless it is in the cache."""
    key = hashlib.sha256("\0".join(MMDEBSTRAP).encode()).hexdigest()[:12]
    image = Image(f"localhost/kvpilot/base:{SUITE}-{key}", images / f"base-{key}.tar")
    if image.archive.exists():
        return image
    say("building the base image with mmdebstrap (about a minute)")
    images.mkdir(parents=True, exist_ok=True)
    rootfs, log = images / "base-rootfs.tar", images / "mmdebstrap.log"
    begun = time.monotonic()
    with log.open("wb") as output:
        done = subprocess.run(
            ["nice", "-n", "10", *MMDEBSTRAP, str(rootfs)],
            stdout=output,
            stderr=output,
            check=False,
            timeout=900,
        )
    if done.returncode:
        raise ClusterError(f"mmdebstrap failed; last lines of {log}:\n" + log.read_text()[-1500:])
    write_archive(image.archive, rootfs, image.reference)
    rootfs.unlink()
    say(f"  base image: built in {time.monotonic() - begun:.0f} s")
    return image


def pause_image(images: Path, program: Path) -> Image:
    """Image of the container that holds the namespaces of a pod."""
    key = hashlib.sha256(program.read_bytes()).hexdigest()[:12]
    image = Image(f"localhost/kvpilot/pause:{key}", images / f"pause-{key}.tar")
    if not image.archive.exists():
        images.mkdir(parents=True, exist_ok=True)
        layer = images / "pause-layer.tar"
        write_single_file_layer(layer, program)
        write_archive(image.archive, layer, image.reference, entrypoint=("/pause",))
        layer.unlink()
    return image
