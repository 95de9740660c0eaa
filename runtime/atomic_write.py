"""Files and folders that appear whole or not at all, on the disk before they have their name."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PARTIAL_SUFFIX", "new_folder", "remove_abandoned", "write_file"]

# Of `.NAME.partial`, which a process is writing, or was killed while writing.
PARTIAL_SUFFIX = ".partial"

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill that takes its name when the block ends well.

    It is filled beside its final place. When the block raises, it is removed with the parents that
    were made for it. Of a process that was killed `.NAME.partial` is left, which the next one that
    makes NAME empties and uses.

    Args:
        path: A new name, or an empty folder that may be replaced.

    Yields:
        The folder to fill.

    Raises:
        ValueError: The name is taken, the folder can't be made, another process is making it, or
            the disk was full.
    """
    path = Path(os.path.abspath(path))
    _check_name(path)
    missing = [folder for folder in path.parents if not os.path.exists(folder)]
    partial = path.parent / f".{path.name}{PARTIAL_SUFFIX}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=True)
    except OSError as error:
        _remove_empty(missing)
        raise ValueError(
            f"{path}: can't be made ({error.strerror}); name a folder elsewhere"
        ) from None
    try:
        with _locked(partial):
            _empty(partial)  # what a killed process left
            try:
                yield partial
                _flush(partial)
                partial.rename(path)  # fails if anything has appeared there
                _flush_names(path.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except BaseException as error:
        _remove_empty(missing)
        if isinstance(error, OSError) and error.errno in _FULL_DISK:
            raise ValueError(
                f"{path}: the disk is full; free some space, or name a folder elsewhere"
            ) from None
        raise


def remove_abandoned(parent: Path) -> None:
    """Removes what killed processes left of folders they were making.

    Args:
        parent: Where; folders that a process is filling stay.
    """
    for partial in parent.glob(f".*{PARTIAL_SUFFIX}/"):
        with contextlib.suppress(ValueError), _locked(partial):
            shutil.rmtree(partial)


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file that others see with all of its content or not at all.

    Args:
        path: The file; one that is there is replaced.
        content: A text, or bytes.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)


def _check_name(path: Path) -> None:
    """What would only fail at the final rename is refused before anything is written."""
    if not path.name:
        raise ValueError(f"{path}: not a name for a folder; name a new one in it")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir() or any(path.iterdir()):
        raise ValueError(f"{path}: already there; remove it or name a new folder")
    # The rename would leave the caller's shell in a folder that is no more.
    if path.samefile(".") or path.is_mount():
        raise ValueError(f"{path}: can't be replaced; name a new folder in it")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Makes the folder this process's alone; the system releases the lock of a killed process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The process that held it may just have renamed it into place.
        if not (folder.exists() and os.path.samestat(os.fstat(handle), folder.stat())):
            raise BlockingIOError
    except BlockingIOError:
        os.close(handle)
        raise ValueError(f"{folder}: another process is writing it; wait for it to end") from None
    try:
        yield
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _flush(folder: Path) -> None:
    """Onto the disk before the rename, so that a power cut leaves nothing that looks complete."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    _flush_names(folder)


def _flush_names(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
