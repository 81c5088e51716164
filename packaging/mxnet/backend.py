"""The build backend of mxnet for Python 3.13 and later."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import repackage


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """Build the wheel; pip calls this."""
    return repackage.build_wheel("mxnet==1.9.1", Path(wheel_directory))
