"""A data set on its way: a `Staging` with a look at what it would replace."""

from __future__ import annotations

from pathlib import Path

from emotrain.data.manifest import CARD, MANIFEST, SPLITS, TOKENIZER, read_manifest
from emotrain.errors import ExistingFileError, UserError
from emotrain.staging import LOCK, Staging

SPACE_HINT = " (a data set takes 2 or 4 bytes a token, and about as much again while it is made)"


def stage_dataset(out: str | Path, overwrite: bool = False) -> Staging:
    """Stage a data set at `out`.

    Args:
        overwrite: whether `out` may be an older data set, which the new one replaces. A folder that
            holds anything else is never replaced.
    Raises:
        ValueError: see `Staging`.
    """
    return Staging(
        out,
        check_replaceable=check_replaceable if overwrite else refuse,
        space_hint=SPACE_HINT,
    )


def refuse(folder: Path) -> None:
    """Refuse to replace a folder."""
    raise ExistingFileError(
        f"{folder}: exists; choose another --out, or replace it with --overwrite"
    )


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that is not a data set, or holds files that are not part of it: they would
    be deleted."""
    try:
        manifest = read_manifest(folder)
    except (ValueError, OSError):
        raise UserError(
            f"{folder}: is not a prepared data set, and --overwrite replaces nothing else; choose "
            f"another "
            f"--out"
        ) from None
    known = (
        {MANIFEST, TOKENIZER, LOCK}
        | ({CARD} if "card" in manifest else set())
        | {info.file for split in SPLITS for info in manifest["splits"][split]["shards"]}
    )
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not (name in SPLITS and path.is_dir()):
            raise UserError(
                f"{folder}: holds {name}, which is not part of the data set; move it away before "
                f"--overwrite"
            )
