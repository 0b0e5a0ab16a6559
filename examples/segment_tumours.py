"""Segment tumours, from scans to scores, in about a minute on one core.

    python examples/segment_tumours.py [FOLDER]

Every step is one call, and every call has a verb: `dagman prepare`, `dagman segment train | predict | score`. The scans
are phantoms of the chest with a large tumour put into one lung. The network is minute, starts from random weights and
sees a few crops; for real work give `dagman segment train --weights RUN` an encoder pretrained on scans like yours, and
hundreds of steps.
"""

import csv
import gzip
import sys
from pathlib import Path

import nibabel
import numpy as np

from dagman import PreparedStore, SwinConfig, prepare
from dagman.ct import phantom
from dagman.ct.index import index
from dagman.ct.prepare import PrepareConfig
from dagman.nets.encoder import new
from dagman.nets.swin import AttentionConfig
from dagman.randomness import generator
from dagman.tasks import matching, segment, segmentation_scores, segmenter
from dagman.train import segment as study
from dagman.train.finetune import FinetuneConfig
from dagman.types import Preparation

work = Path(sys.argv[1] if len(sys.argv) > 1 else "segment-tumours")
(work / "scans").mkdir(parents=True, exist_ok=True)

# 1. Six scans of five patients with outlined tumours, as NIfTI and a table; coarse, to save time.
rows = [["case_id", "image", "mask", "patient"]]
for case in range(6):
    made = phantom.make(0, case, spacing_mm=(4.0, 4.0, 4.0), shape=(76, 66, 42))
    draw = generator(0, "tumour", made.patient)
    lung = np.argwhere(made.organs == next(label for label, name in made.names.items() if "lung" in name))
    centre, radius = lung.mean(axis=0) + draw.uniform(-3, 3, 3), draw.uniform(5, 7)
    tumour = radius > np.linalg.norm(np.indices(made.organs.shape).T - centre, axis=-1).T
    made.volume.hu[tumour] = draw.normal(180, 20, int(tumour.sum()))
    for name, array in (("image", made.volume.hu), ("mask", tumour.astype(np.uint8))):
        image = nibabel.Nifti1Image(array, made.volume.affine)
        (work / "scans" / f"{case}_{name}.nii.gz").write_bytes(gzip.compress(image.to_bytes()))
    rows.append([f"case{case}", f"{case}_image.nii.gz", f"{case}_mask.nii.gz", f"patient{made.patient}"])
with (work / "scans" / "cases.csv").open("w", newline="") as stream:
    csv.writer(stream).writerows(rows)

# 2. One store that crops are read from in milliseconds.
prepare([work / "scans" / "cases.csv"], work / "store", PrepareConfig(spacing_mm=4.0))

# 3. Learn one of three folds; no patient stands on two sides.
config = study.SegmentConfig(
    finetune=FinetuneConfig(steps=12, batch_size=1, learning_rate=1e-2, layer_decay=1.0, check_every=6),
    crop=(32, 32, 64),
)
network = SwinConfig(
    embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), attention=AttentionConfig(stage=2, num_heads=4)
)
encoder = new(network, Preparation(spacing_mm=4.0, window_hu=(-1000.0, 400.0)), seed=0)
result = study.train(encoder, PreparedStore(work / "store"), work / "study", config, only=[0], say=print)
if result is None:
    sys.exit("stopped; the same command goes on")
print("\n".join(segmentation_scores.lines(result)))

# 4. Segment a scan on its own voxels; the file lies over the scan in any viewer.
loaded = segmenter.load(work / "study")
(scan,), _ = index([work / "scans" / "0_image.nii.gz"])
found = segment.predict(loaded, scan, work / "predicted")
print(f"{found.path}: {found.volumes_cc}")

# 5. Score label maps of any tool, here those of the test patients, against the masks, on the scans' voxels.
scored = matching.score([work / "study" / "fold-0" / "predictions"], work / "scans" / "cases.csv")
# One fold of three was learnt: the cases of the others have no prediction and would count as missed.
rows = [row for row in scored.rows if row.case_id not in scored.missing]
segmentation_scores.write(rows, segmentation_scores.summary(rows), work / "scores")
matching.draw(scored, work / "scores")
print(f"{len({row.case_id for row in rows})} cases scored; look at {work / 'scores' / 'cases.png'}")
