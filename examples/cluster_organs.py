"""Do an encoder's features tell organs apart? Crops around the organs of built-in phantoms, in a map and in numbers.

python examples/cluster_organs.py OUTPUT [RUN]      without a run, a small untrained encoder
"""

import sys
from pathlib import Path

import nibabel
import numpy as np

from dagman import PreparedStore, SwinEncoder, load_encoder, prepare, recipes
from dagman.ct import phantom
from dagman.tasks import cluster, structures
from dagman.types import Preparation

output = Path(sys.argv[1])
lines = ["case_id,image,mask,patient"]
(output / "scans").mkdir(parents=True, exist_ok=True)
for case in range(3):
    made = phantom.make(0, case)
    for kind, array in (("ct", made.volume.hu), ("organs", made.organs.astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(array, made.volume.affine), output / "scans" / f"{kind}{case}.nii.gz")
    lines.append(f"phantom{case},ct{case}.nii.gz,organs{case}.nii.gz,patient{made.patient}")
(output / "scans" / "cases.csv").write_text("\n".join(lines))
prepare([output / "scans" / "cases.csv"], output / "prepared", workers=1)

store = PreparedStore(output / "prepared")
recipe = recipes.get("dagman-tiny")
encoder = load_encoder(sys.argv[2]) if len(sys.argv) > 2 else SwinEncoder(recipe.encoder).eval()
if not encoder.report:
    encoder.preparation = Preparation(crop=recipe.data.crop, window_hu=recipe.data.window_hu)
organs = {label: name for label, name in phantom.NAMES.items() if name != "body"}
found = structures.structures(store, organs, crops_each=2)
print(found)
runs = cluster.compare({"encoder": encoder}, store, found.places)
for name, clusters in runs.items():
    print(f"{name:12s} silhouette {clusters.estimate('silhouette')}, k-NN accuracy {clusters.estimate('knn')}")
print("wrote", *cluster.write(runs, output / "clusters"))
