"""How long a random training crop takes, from the storages a prepared volume could have.

    python benchmarks/store.py [--data FOLDER_OF_NIFTI] [--json benchmarks/results/store.json]

Writes one volume at 2 mm in each storage, checks that every crop is the same, and prints the median time of a random
128^3 crop by one process with one thread (files in the page cache; the CPU time is what a busy machine does not
change), beside the file's size and the time to write it.
Without `--data` the volume is 300^3 voxels of tissue with 12 HU of noise. Zarr is measured where it is installed.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import nibabel as nib
import numpy as np

try:
    import zarr
except ImportError:
    zarr = None

from dagman.ct.index import index
from dagman.ct.prepare import PrepareConfig, prepare_volume
from dagman.ct.read import read
from dagman.ct.store import padded_crop, write_array

CROP = (128, 128, 128)
LZ4, LZ4HC, ZSTD = blosc2.Codec.LZ4, blosc2.Codec.LZ4HC, blosc2.Codec.ZSTD
BYTES, BITS = blosc2.Filter.SHUFFLE, blosc2.Filter.BITSHUFFLE


def blosc2_writer(
    codec: blosc2.Codec, level: int, shuffle: blosc2.Filter, *, chunk: int = 72, block: int = 24
) -> Callable[[Path, np.ndarray], None]:
    """A writer of such chunks and blocks, whose bits or bytes are shuffled before they are packed, or neither."""

    def write(path: Path, hu: np.ndarray) -> None:
        settings = {"codec": codec, "clevel": level, "filters": [shuffle], "nthreads": 1}
        blosc2.asarray(hu, urlpath=str(path), mode="w", chunks=(chunk,) * 3, blocks=(block,) * 3, cparams=settings)

    return write


def crop_blosc2(path: Path, corner: tuple[int, ...]) -> np.ndarray:
    """A crop as `PreparedStore` reads it: the file is opened for every crop."""
    return padded_crop(blosc2.open(str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1}), corner, CROP, -1024)


def crop_npy(path: Path, corner: tuple[int, ...]) -> np.ndarray:
    """A crop of a memory-mapped array, copied as a batch needs it."""
    return padded_crop(np.load(path, mmap_mode="r"), corner, CROP, -1024).copy()


def crop_nifti(path: Path, corner: tuple[int, ...]) -> np.ndarray:
    """A crop of a compressed NIfTI, which has to be read from its beginning."""
    return padded_crop(np.asarray(nib.load(path).dataobj), corner, CROP, -1024)


def write_zarr(path: Path, hu: np.ndarray) -> None:
    """Zarr much as the store packs: chunks of 32^3 in shards of 64^3, lz4 on shuffled bits."""
    packer = zarr.codecs.BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle")
    array = zarr.create_array(
        path, shape=hu.shape, dtype=hu.dtype, chunks=(32,) * 3, shards=(64,) * 3, compressors=packer
    )
    array[:] = hu


def crop_zarr(path: Path, corner: tuple[int, ...]) -> np.ndarray:
    """A crop of a Zarr array, opened for every crop as well."""
    return padded_crop(zarr.open_array(path, mode="r"), corner, CROP, -1024)


STORAGES: dict[str, tuple[str, Callable[[Path, np.ndarray], Any], Callable[[Path, tuple[int, ...]], np.ndarray]]] = {
    "b2nd lz4hc level 3, bytes (the store's)": (".b2nd", write_array, crop_blosc2),
    "the same at level 1": (".b2nd", blosc2_writer(LZ4HC, 1, BYTES), crop_blosc2),
    "the same at level 9": (".b2nd", blosc2_writer(LZ4HC, 9, BYTES), crop_blosc2),
    "the same in blocks of 16, chunks of 64": (
        ".b2nd",
        blosc2_writer(LZ4HC, 3, BYTES, chunk=64, block=16),
        crop_blosc2,
    ),
    "the same in blocks of 32, chunks of 64": (
        ".b2nd",
        blosc2_writer(LZ4HC, 3, BYTES, chunk=64, block=32),
        crop_blosc2,
    ),
    "the same in chunks of 144": (".b2nd", blosc2_writer(LZ4HC, 3, BYTES, chunk=144), crop_blosc2),
    "b2nd lz4hc level 3, bits": (".b2nd", blosc2_writer(LZ4HC, 3, BITS), crop_blosc2),
    "b2nd lz4 level 5, bytes": (".b2nd", blosc2_writer(LZ4, 5, BYTES), crop_blosc2),
    "b2nd lz4 level 5, bits": (".b2nd", blosc2_writer(LZ4, 5, BITS), crop_blosc2),
    "the same in blocks of 16, as before": (".b2nd", blosc2_writer(LZ4, 5, BITS, chunk=64, block=16), crop_blosc2),
    "b2nd lz4 level 5, not shuffled": (".b2nd", blosc2_writer(LZ4, 5, blosc2.Filter.NOFILTER), crop_blosc2),
    "b2nd zstd level 1, bits": (".b2nd", blosc2_writer(ZSTD, 1, BITS), crop_blosc2),
    "b2nd zstd level 5, bits": (".b2nd", blosc2_writer(ZSTD, 5, BITS), crop_blosc2),
    "npy": (".npy", write_array, crop_npy),
    "nii.gz": (".nii.gz", lambda path, hu: nib.save(nib.Nifti1Image(hu, np.eye(4)), path), crop_nifti),
}
if zarr is not None:
    STORAGES["zarr lz4, shards of 64"] = (".zarr", write_zarr, crop_zarr)


def volumes(data: Path | None) -> dict[str, np.ndarray]:
    """Prepared volumes to measure on, at least as long as the crop."""
    if data is None:
        return {"noise of 12 HU, 300^3": np.random.default_rng(0).normal(40, 12, (300,) * 3).astype(np.int16)}
    prepared = {scan.case_id: prepare_volume(read(scan), PrepareConfig()).hu for scan in index([data])[0]}
    return {case_id: hu for case_id, hu in prepared.items() if min(hu.shape) >= 128}


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def measure(hu: np.ndarray, folder: Path, num_crops: int) -> list[dict[str, Any]]:
    """Milliseconds per crop, MiB and seconds to write, for each storage; storages take turns."""
    draws = np.random.default_rng(1)
    corners = [tuple(int(draws.integers(0, num - 127)) for num in hu.shape) for _ in range(num_crops)]
    rows = {}
    for name, (suffix, write, _) in STORAGES.items():
        path = folder / f"{len(rows)}{suffix}"
        started = time.perf_counter()
        write(path, hu)
        rows[name] = {"path": path, "write_s": time.perf_counter() - started, "wall": [], "cpu": []}
    for corner in corners:
        expected = padded_crop(hu, corner, CROP, -1024)
        for name in draws.permutation(list(STORAGES)).tolist():  # whoever comes before leaves its traces in the cache
            crop = STORAGES[name][2]
            wall, cpu = time.perf_counter(), time.process_time()
            found = crop(rows[name]["path"], corner)
            rows[name]["wall"].append(time.perf_counter() - wall)
            rows[name]["cpu"].append(time.process_time() - cpu)
            if not np.array_equal(found, expected):
                raise SystemExit(f"{name} gave another crop")
    return [
        {
            "storage": name,
            "crop_ms": round(1000 * float(np.median(row["wall"])), 2),
            "crop_cpu_ms": round(1000 * float(np.median(row["cpu"])), 2),
            "mib": round(size_of(row["path"]) / 2**20, 1),
            "write_s": round(row["write_s"], 2),
        }
        for name, row in rows.items()
    ]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"cpu": model, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "blosc2": blosc2.__version__}


def main() -> None:
    """Measure, print, and write the figures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CTs to prepare and measure on")
    parser.add_argument("--crops", type=int, default=30)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "crop": CROP, "volumes": []}
    print(f"{results['machine']}\n")
    for name, hu in volumes(arguments.data).items():
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(hu, Path(folder), arguments.crops)
        results["volumes"].append({"volume": name, "shape": hu.shape, "storages": rows})
        print(f"{name}, {' x '.join(map(str, hu.shape))} voxels")
        print(f"  {'storage':<40}{'ms a 128^3 crop':>16}{'of CPU':>8}{'MiB':>8}{'s to write':>12}")
        for row in rows:
            print(
                f"  {row['storage']:<40}{row['crop_ms']:>16}{row['crop_cpu_ms']:>8}{row['mib']:>8}{row['write_s']:>12}"
            )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
