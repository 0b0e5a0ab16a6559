"""Where does an encoder look? Semantic attention of a built-in phantom, each head, and its gain on the nodule.

python examples/attention_maps.py OUTPUT [RUN]      without a run, a small untrained encoder
"""

import sys
from pathlib import Path

from dagman import SwinEncoder, load_encoder, recipes
from dagman.ct import phantom
from dagman.ct.index import index
from dagman.tasks import pointing
from dagman.tasks.attention import explain
from dagman.types import Preparation

output = Path(sys.argv[1])
table = phantom.write(output / "phantoms", 1)
recipe = recipes.get("dagman-tiny")
encoder = load_encoder(sys.argv[2]) if len(sys.argv) > 2 else SwinEncoder(recipe.encoder).eval()
if not encoder.report:
    encoder.preparation = Preparation(crop=recipe.data.crop, window_hu=recipe.data.window_hu)
scans, _ = index([table])
found = [explain({"encoder": encoder}, scan, output / "attention", heads=True) for scan in scans]
rows = [look.pointing for one in found for look in one.looks.values()]
for row in rows:
    print(
        f"{row.case_id}: {row.lowest:.2f} to {row.highest:.2f} times uniform, gain on the nodule {row.shares.gain:.2f}"
    )
print("wrote", *(one.picture for one in found), *pointing.write(rows, output / "attention"))
