"""Installs gluon_bert; the extras choose which MXNet comes with it."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PACKAGE = (HERE / "gluon_bert" / "__init__.py").read_text("utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', PACKAGE, re.M)[1]

# CUDA 11 and cuDNN 8 as wheels: the libraries that mxnet-cu112 loads. The upper bounds
# keep the names of the files, such as libcudnn.so.8.
CUDA_LIBRARIES = [
    "nvidia-cudnn-cu11>=8.5,<9",
    "nvidia-cublas-cu11>=11.10,<12",
    "nvidia-cuda-runtime-cu11>=11.7,<12",
    "nvidia-cufft-cu11>=10.7,<11",
    "nvidia-cusolver-cu11>=11.4,<12",
    "nvidia-curand-cu11>=10.2.10,<11",
    "nvidia-cuda-nvrtc-cu11>=11.7,<12",
    "nvidia-nccl-cu11>=2.13,<3",
    "nvidia-nvtx-cu11>=11.7,<12",
]
# 0.20.3 is the last release with a wheel for Python 3.8; later ones would be compiled there, with Rust.
WORDPIECE = [
    "tokenizers>=0.20,<0.21; python_version < '3.9'",
    "tokenizers>=0.20; python_version >= '3.9'",
]
# MXNet's converter imports onnx.mapping, which is gone from 1.19; older than 1.13 was not tried.
# onnxruntime's quantizer imports ml_dtypes without asking for it.
ONNX = ["onnx>=1.13,<1.19", "onnxruntime>=1.12", "ml_dtypes; python_version >= '3.9'"]
# Reads and writes the weights of transformers; 0.3 has NumPy alone as its need.
CONVERT = ["safetensors>=0.3.2"]
# The module of Python 3.14 for the Pythons before it.
ZSTD = ["backports.zstd; python_version >= '3.9' and python_version < '3.14'"]
# Reads the checkpoints of google-research/bert: no other reader of them is kept up.
GOOGLE = ["tensorflow-cpu>=2.10"]
# Compared with, and read and written by conversions. An sdist: installing it takes a C compiler.
GLUONNLP = ["gluonnlp==0.10.0"]
# Its last release, and the last with MXNet. It has to be built beside MXNet, as docs/distributed.md says.
HOROVOD = ["horovod==0.28.1"]


def mxnet(name: str) -> list:
    """The requirement of a wheel of MXNet 1.9.1, on each Python.

    It requires NumPy below 2, which has no wheel for Python 3.13; packaging/ lifts that bound there.
    """
    source = (HERE / "packaging" / name).resolve().as_uri()
    return [
        f"{name}==1.9.1; python_version < '3.13'",
        f"{name} @ {source} ; python_version >= '3.13'",
    ]


setup(
    name="gluon_bert",
    version=VERSION,
    description="Pretrains BERT on Apache MXNet Gluon, on one device or many",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=[*find_packages(include=["gluon_bert", "gluon_bert.*"]), "gluon_bert_commands"],
    package_dir={"gluon_bert_commands": "tools"},
    entry_points={"console_scripts": ["gluon-bert = gluon_bert.cli:main"]},
    package_data={"gluon_bert": ["py.typed"], "gluon_bert.ops": ["native/*"]},
    python_requires=">=3.8",
    install_requires=[
        "numpy>=1.17",
        "matplotlib>=3.5",
        "requests>=2.20",
        # Sparse products for word vectors from co-occurrences.
        "scipy>=1.5",
        "sentencex>=0.6.1",
        "tqdm>=4.60",
        # MXNet imports distutils, which Python 3.12 left to setuptools.
        "setuptools; python_version >= '3.12'",
    ],
    extras_require={
        "cpu": mxnet("mxnet"),
        "cu112": [*mxnet("mxnet-cu112"), *CUDA_LIBRARIES],
        "gluonnlp": GLUONNLP,
        "horovod": HOROVOD,
        "wordpiece": WORDPIECE,
        "onnx": ONNX,
        "convert": [*CONVERT, *WORDPIECE],
        "convert-google": [*GOOGLE, *WORDPIECE],
        # tensorboardX writes the event files, TensorBoard shows them.
        "tensorboard": ["tensorboardX>=2.5", "tensorboard>=2.8"],
        "zstd": ZSTD,
        # Jupyter, and packages to run a notebook in CI.
        "notebook": ["notebook>=6.5", "nbclient>=0.7", "ipykernel>=6"],
        "serve": ["multi-model-server==1.1.11", "model-archiver==1.0.3"],
        "test": ["pytest>=7", "pytest-xdist", "hypothesis", *CONVERT, *WORDPIECE, *ONNX, *ZSTD],
        # Packages for comparing conversions. D2L's package, d2l 0.17.6, pins versions that exclude ours. So
        # it is installed with --no-deps, beside the pandas and ipython that it imports. Metrics are compared
        # with scikit-learn's.
        "test-others": [
            "torch>=2",
            "transformers>=4.30",
            "ctranslate2>=4",
            *GOOGLE,
            "pandas",
            "ipython",
            "scikit-learn",
            "seqeval",
        ],
        "fuzz": ["atheris>=2.3"],
        "lint": ["ruff", "mypy", "pre-commit"],
    },
)
