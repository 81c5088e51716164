"""Rebuilds MXNet's published wheel with one changed line of metadata, which allows NumPy 2.

MXNet 1.9.1 requires NumPy below 2, which has no wheel for Python 3.13: pip would compile it. `setup.py` names
the two folders beside this file as MXNet's source there. The code in the wheel stays as it was published.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LABEL = "+numpy2"  # the local version label: this build is not the one that was published


def build_wheel(requirement: str, folder: Path) -> str:
    """Download a wheel and write it to `folder` with the changed metadata; return its file name."""
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*pip, "--dest", downloads, requirement], check=True)
        (published,) = Path(downloads).glob("*.whl")
        name, version, tags = published.name.split("-", 2)
        changed = folder / f"{name}-{version}{LABEL}-{tags}"
        rewrite(published, changed, f"{name}-{version}.dist-info/", f"{name}-{version}{LABEL}.dist-info/")
    return changed.name


def rewrite(published: Path, changed: Path, old: str, new: str) -> None:
    """Copy a wheel, with changed metadata and its metadata folder renamed from `old` to `new`."""
    with zipfile.ZipFile(published) as source, zipfile.ZipFile(changed, "w") as target:
        metadata = allow_numpy_2(source.read(f"{old}METADATA").decode()).encode()
        record = change_record(source.read(f"{old}RECORD").decode(), old, new, metadata).encode()
        texts = {f"{old}METADATA": metadata, f"{old}RECORD": record}
        for entry in source.infolist():
            renamed = zipfile.ZipInfo(entry.filename.replace(old, new, 1), entry.date_time)
            renamed.external_attr = entry.external_attr
            with target.open(renamed, "w", force_zip64=True) as output:
                if entry.filename in texts:
                    output.write(texts[entry.filename])
                else:
                    with source.open(entry) as content:
                        shutil.copyfileobj(content, output, 1 << 20)


def allow_numpy_2(metadata: str) -> str:
    """Return the metadata with the label in its version and without the upper bound on NumPy."""
    labelled, versions = re.subn(r"(?m)^(Version: .+)$", rf"\1{LABEL}", metadata, count=1)
    allowed, bounds = re.subn(r"(?m)^Requires-Dist: numpy\b.*$", "Requires-Dist: numpy>=2", labelled)
    if (versions, bounds) != (1, 1):
        raise ValueError("the wheel's METADATA must have one Version and one Requires-Dist for numpy")
    return allowed


def change_record(record: str, old: str, new: str, metadata: bytes) -> str:
    """Return a wheel's RECORD with its metadata folder renamed and the hash of the changed METADATA."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(metadata).digest()).rstrip(b"=").decode()
    changed = io.StringIO()
    writer = csv.writer(changed, lineterminator="\n")
    for name, checksum, size in csv.reader(record.splitlines()):
        if name == f"{old}METADATA":
            checksum, size = f"sha256={digest}", str(len(metadata))
        writer.writerow([name.replace(old, new, 1), checksum, size])
    return changed.getvalue()
