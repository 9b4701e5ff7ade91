"""A folder of images, or a .zip of one."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

from tuner.data_spec import FolderSpec
from tuner.sources.decode import ENDINGS, Picture
from tuner.sources.splits import NAMES
from tuner.vae.errors import Refused


def pictures(spec: FolderSpec) -> list[Picture]:
    """Every image in it by name, whatever lies around all of them taken off: below a split's folder, or in no split,
    the next folder is the class, if every image has one and there are two.

    Hidden files, `__MACOSX` and files whose ending is no image's are left out. Raises Refused where nothing is left.
    """
    place = spec.directory
    try:
        found = dict(_below(place) if place.is_dir() else _members(place))
    except (OSError, BadZipFile) as error:
        where, why = getattr(error, "filename", None) or place, getattr(error, "strerror", None)
        raise Refused(f"{where}: {why or 'not a folder, and not a whole .zip'}") from error
    names = sorted(name for name in found if _is_image(name))
    if not names:
        raise Refused(f"{place}: no images in it")
    folders = [name.parts[:-1] for name in names]
    while all(folders) and len({first for first, *_ in folders}) == 1 and folders[0][0].lower() not in NAMES:
        folders = [inner[1:] for inner in folders]
    splits = [NAMES.get(inner[0].lower()) if inner else None for inner in folders]
    classes = [inner[1:] if split else inner for split, inner in zip(splits, folders, strict=True)]
    labels = [inner[0] if inner else None for inner in classes]
    if spec.labels == "none" or None in labels or len(set(labels)) == 1:
        labels = [None] * len(names)
    return [
        Picture(str(name), found[name], split, label) for name, split, label in zip(names, splits, labels, strict=True)
    ]


def _is_image(name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.parts)
    return not hidden and name.suffix.lower() in ENDINGS


def _below(place: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    """Every file and every link that leads nowhere; a folder that is linked to is entered once, where it is nearest."""
    entered = set()
    folders = [place]
    for folder in folders:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in entered:
            continue
        entered.add((status.st_dev, status.st_ino))
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                folders.append(path)
            elif path.is_file() or not path.exists():  # anything else might never end
                yield PurePosixPath(path.relative_to(place)), path.read_bytes


def _members(place: Path) -> Iterator[tuple[PurePosixPath, Callable[[], bytes]]]:
    archive = ZipFile(place)
    for member in archive.infolist():
        if not member.is_dir():
            yield PurePosixPath(member.filename), partial(archive.read, member)
