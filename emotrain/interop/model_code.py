"""The code that runs a Hugging Face folder elsewhere: files of `modeling/`, copied into the folder,
and `auto_map`, by which its config.json names their classes."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emotrain.files import flush_to_disk, json_text, write_whole
from emotrain.interop.huggingface import CONFIG, HuggingFaceFolder

CODE = ("attention_emotrain.py", "configuration_emotrain.py", "modeling_emotrain.py")
"""Names that no released folder has: swapping code replaces no file but config.json, in one
step."""

AUTO_MAP = {
    "AutoConfig": "configuration_emotrain.EmoConfig",
    "AutoModel": "modeling_emotrain.EmoModel",
    "AutoModelForCausalLM": "modeling_emotrain.EmoForCausalLM",
}

ORIGINAL = "config.original.json"
"""The config.json of before a swap."""


@dataclass(frozen=True)
class Swapped:
    """What a swap of the code has done."""

    folder: str
    code: list[str]
    """Files that were written."""
    replaced_auto_map: dict[str, Any] | None
    """What config.json named before."""
    original_config: str | None
    """File that keeps the config.json of before; null where it had named our code already."""
    unused_settings: list[str]
    """Of config.json, and not known to have no effect."""


def write_code(folder: Path) -> None:
    """Write the files of `CODE` into a folder."""
    for name in CODE:
        write_whole(folder / name, (Path(__file__).parent / "modeling" / name).read_bytes())


def swap_code(folder: str | Path) -> Swapped:
    """Let a folder in a Hugging Face format run our code in place of the code that came with it.

    Weights, tokenizer and all files of the folder stay as they are but for `auto_map` in
    config.json, and that changes last, in one step: a killed command leaves the folder as it was,
    at most with files that nothing names. Code that came with the folder stays, unused. Where
    config.json is a link, as in a download cache, the file that it points to stays.

    Args:
        folder: in the published or the clean layout, checked as for an import.
    Raises:
        UserError: see `HuggingFaceFolder.read`. OSError: the folder cannot be written to.
    """
    read = HuggingFaceFolder.read(folder)
    path, before = read.path, read.published.get("auto_map")
    config, original = path / CONFIG, path / ORIGINAL
    is_new = before != AUTO_MAP
    files = [*(path / name for name in CODE), *([original] if is_new else [])]
    made = [file for file in files if not file.exists()]
    try:
        write_code(path)
        if is_new:
            write_whole(original, config.read_bytes())
        for file in files:
            flush_to_disk(file)
        flush_to_disk(path)
        if is_new:
            partial = path / f".{CONFIG}.partial"
            partial.write_text(json_text({**read.published, "auto_map": AUTO_MAP}, indent=2))
            flush_to_disk(partial)
            os.replace(partial, config)
    except BaseException:
        for file in [*made, *(path / f".{file.name}.partial" for file in (*files, config))]:
            with suppress(OSError):
                file.unlink(missing_ok=True)
        raise
    flush_to_disk(path)
    return Swapped(
        folder=str(folder),
        code=list(CODE),
        replaced_auto_map=before if is_new and isinstance(before, dict) else None,
        original_config=ORIGINAL if is_new else None,
        unused_settings=read.config.unused,
    )
