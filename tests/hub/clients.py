"""The clients that are tried, each huggingface_hub in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from tests.environments import environment

REQUIREMENTS = {
    "0.36": ("huggingface_hub==0.36.2", "transformers==4.57.6"),  # the oldest transformers that README names
    "1.33": ("huggingface_hub==1.33.0",),
    "2.4": ("huggingface_hub==2.4.0",),
}


def python_of(version: str) -> Path:
    """The interpreter of the environment with this huggingface_hub."""
    return environment(f"hub-clients/{version}", REQUIREMENTS[version], sees_ours=True) / "python"
