"""Small tar shards for tests."""

from __future__ import annotations

import io
import tarfile


def write_tar(path, entries, fmt=tarfile.GNU_FORMAT):
    """A tar of (name, bytes) or ready TarInfo entries."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=fmt, errors="surrogateescape") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def special(name, kind, linkname=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, linkname
    return info


def samples(count, first=0, label=True):
    """Images of odd sizes with a label each."""
    for i in range(first, first + count):
        yield f"d/{i:04d}.jpg", bytes([i % 251]) * (1 + 97 * i)
        if label:
            yield f"d/{i:04d}.cls", b"%d\n" % (i % 3)
