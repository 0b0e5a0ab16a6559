"""The same cases and folds for nnU-Net, so that it can stand beside us as a baseline.

`nnUNet_raw/DatasetNNN_NAME` is written as nnU-Net v2 documents it; its predictions are label maps that
`dagman segment score` reads, with `cases.csv` of that folder as reference. With a split column, test cases go to
`imagesTs` and `labelsTs`, where nnU-Net's planning and training do not look.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Num

from dagman import files
from dagman.ct.index import index
from dagman.ct.read import read, read_mask_of
from dagman.ct.store import MANIFEST, PreparedStore
from dagman.errors import DagmanError, ExitCode
from dagman.tasks import study
from dagman.tasks.protocol import BY_PATIENT, Part, Protocol
from dagman.tasks.segment import write_nifti
from dagman.tasks.study import Case, Study
from dagman.tasks.table import write_rows
from dagman.types import Scan

Triples = Iterator[tuple[int, Num[np.ndarray, "x y z"], np.ndarray, np.ndarray]]
"""Row, HU, label map and affine of each case that has a mask."""


def export(
    source: Path,
    raw: Path,
    *,
    number: int = 501,
    name: str = "CT",
    labels: str | None = None,
    protocol: Protocol = BY_PATIENT,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set with our folds.

    Args:
        source: A prepared store; or a CSV table, an nnU-Net or Decathlon folder or a MONAI datalist, whose scans are
            written with their own voxels.
        raw: The folder that nnU-Net knows as `nnUNet_raw`.
        number: Of the data set, 1 to 999.
        name: Of the data set.
        labels: As `classes.choose`; classes are numbered from 1, as nnU-Net wants them.
        protocol: As of `segment train`, whose folds are the same.
        progress: Hears of each finished case.

    Returns:
        The data set's folder.

    Raises:
        DagmanError: As `study.study` and `study.parts`; `E-OUTPUT`, exit code 4, for a folder that exists.

    Reference:
        nnU-Net v2, documentation/dataset_format.md and documentation/manual_data_splits.md.
    """
    folder = raw / f"Dataset{number:03d}_{name}"
    if not 0 < number < 1000 or folder.exists():
        raise DagmanError(
            "OUTPUT",
            folder,
            "exists, or its number is not 1 to 999",
            "choose another --number",
            exit_code=ExitCode.REFUSED,
        )
    is_store = (source / MANIFEST).is_file()
    cases, volumes = _from_store(source) if is_store else _from_table(source)
    plan = study.study(source, cases, labels=labels, group_by=protocol.group_by)
    chosen = study.parts(plan, protocol)
    tested = set(chosen[0].test) if len(chosen) == 1 else set()
    temporary = folder.with_name(f".{folder.name}{files.TEMPORARY_SUFFIX}")
    files.remove_folder(temporary)
    for done, (row, hu, label_map, affine) in enumerate(volumes(plan.rows), 1):
        image, mask = _places(cases[row].case_id, tested=row in tested)
        write_nifti(hu, affine, temporary / image)
        write_nifti(plan.classes.numbers(label_map), affine, temporary / mask)
        if progress:
            progress(done, len(plan.rows))
    files.write_json(temporary / "splits_final.json", [_fold(cases, part, apart=bool(tested)) for part in chosen])
    _write_tables(temporary, cases, plan, tested, with_patients=protocol.group_by == "patient")
    files.publish_folder(temporary, folder)
    return folder


def _places(case: str, *, tested: bool) -> tuple[str, str]:
    """Image and label map of a case in the folder."""
    side = "Ts" if tested else "Tr"
    return f"images{side}/{case}_0000.nii.gz", f"labels{side}/{case}.nii.gz"


def _fold(cases: list[Case], part: Part, *, apart: bool) -> dict[str, list[str]]:
    """One of nnU-Net's folds: it validates on our test cases, or, where these are apart, on those held out."""
    learnt, judged = (part.train, part.held_out) if apart else ((*part.train, *part.held_out), part.test)
    return {"train": _names(cases, learnt), "val": _names(cases, judged or learnt)}


def _names(cases: list[Case], rows: tuple[int, ...]) -> list[str]:
    return sorted(cases[row].case_id for row in rows)


def _write_tables(folder: Path, cases: list[Case], plan: Study, tested: set[int], *, with_patients: bool) -> None:
    """`cases.csv` for `segment score`: what is tested, and patients where they are known; and `dataset.json`."""
    judged = [each for each in zip(plan.rows, plan.groups, strict=True) if not tested or each[0] in tested]
    write_rows(
        folder / "cases.csv",
        ("case_id", "image", "mask", *(("patient",) if with_patients else ())),
        (
            (name := cases[row].case_id, *_places(name, tested=row in tested), *((group,) if with_patients else ()))
            for row, group in judged
        ),
    )
    described = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: number for number, name in enumerate(plan.classes.names, 1)}},
        "numTraining": len(plan.rows) - len(tested),
        "file_ending": ".nii.gz",
    }
    files.write_json(folder / "dataset.json", described)


def _from_store(source: Path) -> tuple[list[Case], Callable[[tuple[int, ...]], Triples]]:
    store = PreparedStore(source)

    def volumes(rows: tuple[int, ...]) -> Triples:
        for row in rows:
            mask = store.mask(row)
            assert mask is not None
            yield row, store.hu(row), mask, np.array(store.rows[row]["affine"])

    return study.stored(store), volumes


def _from_table(source: Path) -> tuple[list[Case], Callable[[tuple[int, ...]], Triples]]:
    """Scans with their own voxels, turned to RAS+; the masks are read once for their labels, and once again.

    Raises:
        DagmanError: `E-TABLE` for a source with rows that cannot be used: a baseline is trained on all or nothing.
    """
    scans, problems = index([source])
    for problem in problems:
        if not problem.ignored:
            raise DagmanError("TABLE", source, f"has a row that cannot be used ({problem})", "mend it first")
    cases = [
        Case(
            case_id=scan.case_id,
            patient=scan.patient,
            split=scan.split,
            labels=_labels(scan) if scan.mask else None,
            names=scan.called,
        )
        for scan in scans
    ]

    def volumes(rows: tuple[int, ...]) -> Triples:
        for row in rows:
            volume = read(scans[row])
            mask = read_mask_of(scans[row], volume)
            assert mask is not None
            yield row, volume.hu, mask.hu, volume.affine

    return cases, volumes


def _labels(scan: Scan) -> frozenset[int]:
    mask = read_mask_of(scan, read(scan))
    assert mask is not None
    return frozenset(map(int, np.unique(mask.hu))) - {0}
