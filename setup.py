"""Package definition. The top-level folder `kernels/` is installed as `extrema_fast.kernels`.

Everything about the distribution is here; pyproject.toml holds the build system and tool settings.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# the version stands once, in extrema_fast/__init__.py; read as text, since importing it needs torch
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (ROOT / "extrema_fast/__init__.py").read_text(encoding="utf-8"), re.M
).group(1)

KERNELS = ["extrema_fast.kernels"] + [f"extrema_fast.kernels.{name}" for name in find_packages("kernels")]

# where wheels of Triton and DALI exist; elsewhere the plain PyTorch and Pillow paths run
LINUX = 'platform_system == "Linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'

DEPENDENCIES = [
    "torch>=2.10",
    f"triton>=3.6; {LINUX}",
    "numpy>=1.26",
    "safetensors>=0.4.3",
    'tomli>=2; python_version < "3.11"',
]

# the documentation site, which a test builds; none for Python 3.10
SITE = [f'{name}; python_version >= "3.11"' for name in ("mkdocs-material>=9.6", "mkdocstrings-python>=1.16")]

# never apex: the package of that name on PyPI is an unrelated toolkit
EXTRAS = {
    "train": [
        "pillow>=10.1",
        "scikit-image>=0.22",
        # TIFF files of several channels
        "tifffile>=2023.8",
        "rich>=13",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    "completion": ["shtab>=1.13"],
    # compressed TIFF files of several channels, HEIC
    "formats": ["imagecodecs>=2023.9", "pillow-heif>=0.16"],
    # t-SNE, and videos other than GIF and animated PNG, in `extrema-fast visualize`
    "visualize": ["scikit-learn>=1.4", "imageio>=2.30", "av>=12"],
    "umap": ["umap-learn>=0.5.6"],
    "tensorboard": ["tensorboard>=2.15"],
    "wandb": ["wandb>=0.19"],
    "trackio": ["trackio>=0.20"],
    "mlflow": ["mlflow>=2.16"],
    "dali-cuda13": [f"nvidia-dali-cuda130>=2.0; {LINUX}"],
    "dali-cuda12": [f"nvidia-dali-cuda120>=2.0; {LINUX}"],
    "xformers": ["xformers>=0.0.35"],
    "quack": [f"quack-kernels>=0.6; {LINUX}"],
    "timm": ["timm>=1.0.20", "torchvision>=0.25"],
    "hf": ["transformers>=5", "timm>=1.0.20", "torchvision>=0.25"],
    "onnx": ["onnx>=1.18", "onnxruntime>=1.22", "onnxscript>=0.5"],
    "parquet": ["pyarrow>=17"],
    "fp8": [f"torchao>=0.18; {LINUX}"],
    "bench": ["matplotlib>=3.8"],
    # other people's methods in `python -m benchmarks race`
    "race": ["lightly>=1.6", "timm>=1.0.20", "torchvision>=0.25", "matplotlib>=3.8"],
    # other people's libraries that the encoder is tried in (tests/contract/test_tools.py)
    "tools": [
        "accelerate>=1.10",
        "captum>=0.8",
        "fvcore>=0.1.5",
        "grad-cam>=1.5.5",
        "lightning>=2.5",
        "peft>=0.17",
        "ptflops>=0.7.5",
        "segmentation-models-pytorch>=0.5",
        "torch-pruning>=1.6",
        f"torchao>=0.18; {LINUX}",
        "torchinfo>=1.8",
    ],
    "dev": [
        "codespell>=2.4",
        "import-linter>=2.1",
        "mypy>=1.15",
        "pytest>=8",
        "pytest-cov>=6",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "packaging>=23",
        "ruff>=0.9",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "setuptools>=77",
        "shtab>=1.13",
        "tensorboard>=2.15",
        *SITE,
    ],
    "docs": SITE,
}

setup(
    name="extrema-fast",
    version=VERSION,
    description="ExtreMA self-supervised pretraining of vision transformers: fast, restartable, one command",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["self-supervised learning", "vision transformer", "masked siamese", "ExtreMA", "PyTorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["extrema_fast", "extrema_fast.*"]) + KERNELS,
    package_dir={"extrema_fast.kernels": "kernels"},
    package_data={"": ["README.md", "configs/*.json", "*.json", "*.j2", "py.typed"]},
    entry_points={"console_scripts": ["extrema-fast = extrema_fast.__main__:main"]},
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    zip_safe=False,
)
