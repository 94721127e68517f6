"""Repositories of Hugging Face's hub as local folders, by huggingface_hub."""

import json
from pathlib import Path

from tosa_jax.errors import WeightsError

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of weights in a folder of transformers, timm or the hub, in order of preference."""

STATEMENTS = ("config.json", "preprocessor_config.json")
"""Files beside them that say what the network is, and how images are prepared."""

_SCHEMES = ("hf:", "hf-hub:", "hf_hub:")  # this project's, timm's, timm's of earlier versions


def is_address(path: str) -> bool:
    """Whether a text names a repository of the hub: `hf:owner/name`, or timm's `hf-hub:owner/name`."""
    return path.startswith(_SCHEMES)


def fetch(address: str) -> Path:
    """Downloads `hf:owner/name[@revision][/file]` and returns the path of the local copy.

    `STATEMENTS` are downloaded too, if they are there. Without a file name this takes the first of `WEIGHT_FILES`; of
    an index also all files that it names.

    Raises WeightsError: huggingface_hub is not installed, no network, no such repository or file.
    """
    owner, _, rest = address.partition(":")[2].partition("/")
    name, _, file = rest.partition("/")
    name, _, revision = name.partition("@")
    if not owner or not name:
        raise WeightsError(f"{address!r} is not hf:owner/name or hf:owner/name/file")
    try:
        import huggingface_hub  # pyright: ignore[reportMissingImports]
        from huggingface_hub.errors import (  # pyright: ignore[reportMissingImports]
            EntryNotFoundError,
            LocalEntryNotFoundError,
        )
    except ImportError as error:
        raise WeightsError(
            f"{address} needs the package huggingface_hub, which is not installed: "
            "pip install huggingface_hub, or download the file and give its path"
        ) from error

    def download(wanted: str) -> Path | None:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    f"{owner}/{name}", wanted, revision=revision or None
                )
            )
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):
                raise
            return None

    try:
        for wanted in STATEMENTS:
            download(wanted)
        for wanted in [file] if file else WEIGHT_FILES:
            if (path := download(wanted)) is not None:
                if wanted.endswith(".index.json"):
                    for shard in set(json.loads(path.read_text())["weight_map"].values()):
                        download(shard)
                return path
    except Exception as error:  # the hub's client has changed its HTTP library, and so the errors
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise WeightsError(
            f"{address} cannot be had from the hub ({reason}); check the name and the network, or "
            "download the file and give its path"
        ) from error
    raise WeightsError(f"{address}: the repository holds no {file or ' or '.join(WEIGHT_FILES)}")
