"""Data sets as they lie: nnU-Net and Medical Segmentation Decathlon folders, MONAI datalists.

Each is a JSON file that names images and label maps, so label maps are never taken for scans, and test cases are known.
What they say of one case becomes the row that a CSV table would hold (`dagman.ct.table`).
"""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from dagman.ct import table
from dagman.ct.survey import Survey, clean_name, short_hash
from dagman.errors import DagmanError, count, printable
from dagman.types import Scan

DATASET = "dataset.json"
SPLITS = {"training": "train", "validation": "validation", "test": "test", "testing": "test"}
"""Keys of a datalist, and the word of the store."""
NOT_CT = re.compile(r"(MRI?|T1|T2|FLAIR|ADC|DWI|PET|US)\b.*", re.IGNORECASE)
"""Names of channels that are no CT."""
_MOST_BYTES = 64 * 2**20
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".dcm")
ITEM_KEYS = ("image", "label", "mask", "patient", "fold")
"""What is read of an item of a datalist."""
_FOLDERS = (("imagesTr", "labelsTr", "train"), ("imagesTs", "labelsTs", "test"))
Item = dict[str, str]


def lists(source: Path) -> list[Path]:
    """The lists that say what a source holds: itself, its `dataset.json`, or those of the folders right below it."""
    if source.suffix.lower() == ".json" and source.is_file():
        return [source]
    if not source.is_dir():
        return []
    here = source / DATASET
    try:
        below = [] if _is_dataset(here) else sorted(source.glob(f"*/{DATASET}"))
    except OSError:
        return []
    return [here] if _is_dataset(here) else [path for path in below if _is_dataset(path)]


def is_whole(source: Path, listed: list[Path]) -> bool:
    """Whether the list says everything there is to know of the source, which then is not walked."""
    return listed in ([source], [source / DATASET])


def _is_dataset(path: Path) -> bool:
    """Whether a `dataset.json` is of a shape known here; any other stands among the files of its folder."""
    try:
        content = _content(path)
    except DagmanError:
        return False
    return _is_listed(content) or _is_nnunet(path, content) or _lists_by_name(content)


def _lists_by_name(content: dict[str, Any]) -> bool:
    """Whether cases stand under their names alone, as nnU-Net's second version allows."""
    cases = content.get("dataset")
    listed = isinstance(cases, dict) and all(isinstance(case, dict) and "images" in case for case in cases.values())
    return listed and bool(cases) and not _is_listed(content)


def _is_listed(content: dict[str, Any]) -> bool:
    return any(isinstance(content.get(key), list) for key in SPLITS)


def _is_nnunet(path: Path, content: dict[str, Any]) -> bool:
    return bool(content.keys() & {"channel_names", "modality"}) and (path.parent / "imagesTr").is_dir()


def read(path: Path, survey: Survey) -> list[Scan]:
    """Scans of a data set or datalist; cases that cannot be used go to `survey.problems` with their place in the list.

    A label is a mask where it names a file, and a class where it is a number or a word; `mask` is one beside it. Cases
    for training are of the split `train`, or of `fold-N` where the list names folds; nobody's patient is known unless
    an item has `patient`. Keys that are not used are noted.

    Args:
        path: A `dataset.json`, or a MONAI datalist whose paths count from its own folder.
        survey: What is shared with other sources.
    """
    if path.name == DATASET:
        status = path.parent.stat()
        survey.visited.add((status.st_dev, status.st_ino))
    try:
        content = _content(path)
        _check_channels(path, content)
        _check_labels(path, content)
        if _lists_by_name(content):
            raise _refused(path, "lists its cases under dataset, by name, which is not read", "give a MONAI datalist")
        if _is_listed(content):
            items = _listed(path, content)
            _note_unused(path, content, survey)
        elif _is_nnunet(path, content):
            items = _nnunet(path, content)
        else:
            problem = f"has none of the keys {', '.join(SPLITS)} and no folder imagesTr beside it"
            raise _refused(path, problem, "give an nnU-Net or MSD folder or a MONAI datalist")
    except DagmanError as error:
        survey.reject(error.code, error.subject, error.problem, error.advice)
        return []
    rows: list[tuple[str, str, Item]] = []
    for place, item in _named(path, items, survey):
        if "problem" in item:
            survey.reject("LAYOUT", f"{path}:{place}", item["problem"], "correct the list")
        else:
            rows.append((f"{path}:{place}", f"{place} of {path.name}", item))
    if regions := _regions(content):
        survey.reject(
            "LAYOUT",
            path,
            f"its regions are not used ({', '.join(regions)[:100]}): each number in a mask is a class",
            f"to join numbers, give such as --labels {regions[0]}",
            ignored=True,
        )
    names = _label_names(content)
    return [replace(scan, label_names=names) for scan in table.scans(rows, path, survey, "LAYOUT")]


def _labels(content: dict[str, Any]) -> list[tuple[Any, str]]:
    """Numbers, or what stands in their place, and names: `name: number` of nnU-Net, `number: name` of MSD."""
    given = content.get("labels")
    found = []
    for key, value in given.items() if isinstance(given, dict) else ():
        number, name = (key, value) if isinstance(value, str) and key.isdecimal() else (value, key)
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        found.append((number, printable(str(name)).strip()[:100]))
    return found


def _check_labels(path: Path, content: dict[str, Any]) -> None:
    """No label says that its voxels are not known: they would be learnt as a class of their own."""
    for number, name in _labels(content):
        if name.lower() == "ignore" and number:
            problem = f"declares a label to ignore ({str(number)[:20]}), which is not supported: it would be a class"
            advice = "write masks of plain classes and drop the entry, or give the images alone where no mask is needed"
            raise _refused(path, problem, advice)


def _regions(content: dict[str, Any]) -> list[str]:
    """Names that stand for several numbers (nnU-Net's region-based training), as `--labels` would join them."""
    return [
        f"{name}={'+'.join(map(str, numbers))}"
        for numbers, name in _labels(content)
        if isinstance(numbers, list) and len(numbers) > 1
    ]


def _label_names(content: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """What labels are called, without the background."""
    named = {
        number: name
        for number, name in _labels(content)
        if type(number) is int and number > 0 and name.lower() not in ("", "background")
    }
    return tuple(sorted(named.items()))


def _refused(path: Path, problem: str, advice: str) -> DagmanError:
    return DagmanError("LAYOUT", path, problem, advice)


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise _refused(path, f"is larger than {_MOST_BYTES >> 20} MiB", "split the list")
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _refused(path, f"cannot be read as JSON ({type(error).__name__})", "correct the file") from None
    if not isinstance(content, dict):
        raise _refused(path, "is no JSON object", "give an nnU-Net or MSD folder or a MONAI datalist")
    return content


def _check_channels(path: Path, content: dict[str, Any]) -> None:
    """One channel, and that a CT."""
    channels = content.get("channel_names") or content.get("modality")
    names = [str(name) for name in channels.values()] if isinstance(channels, dict) else []
    listed = printable(", ".join(names))[:100]
    if len(names) > 1:
        advice = "keep the CT channel, one image a case, and say so in this file"
        raise _refused(path, f"declares {len(names)} channels ({listed}), where one CT is read", advice)
    if names and NOT_CT.fullmatch(names[0]):
        raise DagmanError("MODALITY", path, f"declares {listed} images, not CT", "give a data set of CTs")


def _nnunet(path: Path, content: dict[str, Any]) -> list[tuple[str, Item]]:
    """Cases of `imagesTr` and `imagesTs`, by the names of their files."""
    ending = content.get("file_ending", ".nii.gz")
    if ending not in _ENDINGS:
        raise _refused(path, f"declares files {printable(ending)[:20]}", f"give {', '.join(_ENDINGS[:-1])} files")
    items: list[tuple[str, Item]] = []
    for images, labels, split in _FOLDERS:
        folder = path.parent / images
        names = _names(folder)
        pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}")
        channels = [match.groups() for name in names if not name.startswith(".") and (match := pattern.fullmatch(name))]
        several = {case for case, channel in channels if channel != "0000"}
        for case in dict.fromkeys(case for case, _ in channels):
            place = f"{images}/{case}"
            mask = f"{labels}/{case}{ending}"
            if case in several:
                items.append(
                    (place, {"image": place, "problem": "has other channels than _0000, where one CT is read"})
                )
                continue
            item = {"image": f"{place}_0000{ending}", "split": split, "name": case}
            if split == "train" or (path.parent / mask).exists():
                item["mask"] = mask
            items.append((place, item))
    return items


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208
    except FileNotFoundError:
        return []
    except OSError:
        raise DagmanError("PERM", folder, "may not be listed", "give yourself the right to read it") from None


def _listed(path: Path, content: dict[str, Any]) -> list[tuple[str, Item]]:
    """Items under the keys of `SPLITS`."""
    items = []
    for key, split in SPLITS.items():
        entries = content.get(key, [])
        if not isinstance(entries, list):
            raise _refused(path, f"holds no list under {key}", "correct the file")
        for number, entry in enumerate(entries):
            try:
                item = _item(path, entry, split)
            except ValueError as problem:
                item = {"image": "", "problem": str(problem)}
            except OSError:
                item = {"image": "", "problem": "names a path that cannot be looked at"}
            items.append((f"{key}[{number}]", item))
    return items


def _note_unused(path: Path, content: dict[str, Any], survey: Survey) -> None:
    """Say which keys of the items are left alone.

    Raises:
        DagmanError: `E-LAYOUT` where a key is another spelling of one that no item has: its values would be lost.
    """
    entries = [entry for key in SPLITS for entry in content.get(key, []) if isinstance(entry, dict)]
    keys = list(dict.fromkeys(printable(str(key)) for entry in entries for key in entry))
    absent = [key for key in ITEM_KEYS if key not in keys]
    unused = [key for key in keys if key not in ITEM_KEYS]
    for key in unused:
        if (plain := re.sub("[^a-z]", "", key.lower()).removesuffix("id").removesuffix("s")) in absent:
            raise _refused(path, f"has items with {key}, which is nearly {plain}", f"name it {plain}")
    if any(_is_file(str(entry.get("label"))) and entry.get("mask") is not None for entry in entries):
        unused.append("mask beside a label that is a file")
    if unused:
        problem = (
            f"{count(len(unused), 'key of its items is', 'keys of its items are')} not used ({', '.join(unused)[:120]})"
        )
        survey.reject("LAYOUT", path, problem, f"those that are used are {', '.join(ITEM_KEYS)}", ignored=True)


def _item(path: Path, entry: Any, split: str) -> Item:
    entry = {"image": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, dict):
        raise ValueError("is no item with image and label")
    image = _image(path, entry.get("image"))
    item = {"image": _with_channel(path, image), "name": _stem(image), "split": split}
    if (fold := entry.get("fold")) is not None and split == "train":
        item["split"] = f"fold-{_scalar(fold, 'fold')}"
    if (patient := entry.get("patient")) is not None:
        item["patient"] = _scalar(patient, "patient")
    if (label := entry.get("label")) is not None:
        word = _scalar(label, "label")
        item["mask" if _is_file(word) else "label"] = _inside(path, word) if _is_file(word) else word
    if "mask" not in item and (mask := entry.get("mask")) is not None:
        item["mask"] = _inside(path, _scalar(mask, "mask"))
    return item


def _is_file(label: str) -> bool:
    return "/" in label or label.partition("#")[0].lower().endswith(_ENDINGS)


def _image(path: Path, image: Any) -> str:
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if isinstance(image, list):
        raise ValueError(f"has {len(image)} images, where one CT is read")
    if not isinstance(image, str) or not image:
        raise ValueError("names no image")
    return _inside(path, image)


def _with_channel(path: Path, image: str) -> str:
    """nnU-Net's first version lists cases, whose files carry their channel."""
    head, stem, ending = image.rpartition(_stem(image))
    with_channel = f"{head}{stem}_0000{ending}"
    missing = path.name == DATASET and stem and not (path.parent / image).exists()
    return with_channel if missing and (path.parent / with_channel).exists() else image


def _inside(path: Path, cell: str) -> str:
    """A path of a data set's own list, which may not lead out of its folder."""
    if path.name == DATASET and (Path(cell).is_absolute() or os.path.normpath(cell).split("/")[0] == ".."):
        raise ValueError(f"{printable(cell)[:200]} leads out of the data set's folder")
    return cell


def _scalar(value: Any, name: str) -> str:
    """A number or a word as text."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"has a {name} that is neither a number nor a word")
    return str(value).strip()


def _stem(image: str) -> str:
    name = image.rstrip("/").rsplit("/", 1)[-1]
    ending = next((each for each in _ENDINGS if name.lower().endswith(each)), "")
    return name[: len(name) - len(ending)]


def _named(path: Path, items: list[tuple[str, Item]], survey: Survey) -> list[tuple[str, Item]]:
    """Items with a `case_id`: the stem of the image, and a hash of what they are where that is not the only one."""
    stems = [clean_name(item.pop("name", "") or _stem(item["image"])) for _, item in items]
    uses = Counter(stem.lower() for stem in stems)
    for stem, (_, item) in zip(stems, items, strict=True):
        taken = uses[stem.lower()] > 1 or f"case_id is {stem.lower()}" in survey.rows
        own = f"{path.parent.absolute().name}/{item['image']}\n{item.get('mask', '')}"
        name = f"{stem}-{short_hash(own)}" if taken else stem
        if taken and f"case_id is {name.lower()}" in survey.rows:  # data sets of one name: their place tells them apart
            name = f"{stem}-{short_hash(f'{path.parent.absolute()}/{own}')}"
        item["case_id"] = name
    return items
