"""`emotrain verify`: check the files of checkpoints against their checksums. Nothing is changed
or removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emotrain.errors import MissingFileError
from emotrain.progress import ProgressBar


def verify_all(paths: list[Path]) -> dict[str, Any]:
    """Check checkpoints one by one.

    Args:
        paths: checkpoint folders, or run folders.

    Raises:
        FileNotFoundError: a path that holds no checkpoint, whole or not.
    """
    from emotrain.training.checkpoint_folders import list_leftovers, verify

    folders, leftovers = [], []
    for path in paths:
        folders += _checkpoints(path)
        leftovers += [str(leftover) for leftover in list_leftovers(path)]
    num_bytes = {
        folder: sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        for folder in folders
    }
    checkpoints = []
    with ProgressBar("bytes") as bar:
        bar.start("verifying", sum(num_bytes.values()))
        for folder in folders:
            try:
                verify(folder, track=bar.advance)
                error = None
            except (ValueError, OSError) as failure:
                error = " ".join(str(failure).split())
            checkpoints.append(
                {
                    "path": str(folder),
                    "bytes": num_bytes[folder],
                    "whole": error is None,
                    "error": error,
                }
            )
    return {
        "whole": all(entry["whole"] for entry in checkpoints),
        "checkpoints": checkpoints,
        "leftovers": leftovers,
    }


def describe(result: dict[str, Any]) -> str:
    """One line a checkpoint."""
    lines = [
        f"{entry['path']}: whole, {entry['bytes'] / 1e6:,.1f} MB"
        if entry["whole"]
        else f"damaged: {entry['error']}"
        for entry in result["checkpoints"]
    ]
    lines += [
        f"{path}: left by a process that was killed; the run's next checkpoint removes it"
        for path in result["leftovers"]
    ]
    return "\n".join(lines)


def _checkpoints(path: Path) -> list[Path]:
    """The checkpoint at a path, or those of the run there. Those without a manifest count too:
    they are damaged."""
    from emotrain.folders import MANIFEST
    from emotrain.training.checkpoint_folders import NAME

    if (
        NAME.fullmatch(path.name)
        and path.is_dir()
        or (path / MANIFEST).is_file()
        and (path / "state.json").is_file()
    ):
        return [path]
    found = sorted(
        folder
        for folder in (path / "checkpoints").glob("step-*")
        if NAME.fullmatch(folder.name) and folder.is_dir()
    )
    if not found:
        raise MissingFileError(
            f"{path}: no checkpoint here; give a run folder that has one, or one of its "
            f"RUN_DIR/checkpoints/step-…"
        )
    return found
