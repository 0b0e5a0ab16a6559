"""Tell malignant from benign nodules: a linear probe, fine-tuning, and new scans. Under a minute on one core.

    python examples/finetune_classifier.py [FOLDER]

Every step is one call, and every call has a verb: `dagman prepare`, `embed`, `classify probe | finetune | predict`,
`compare`. The network is minute, starts from random weights and sees a few crops, so its AUC says nothing about the
method; give `load_encoder(RUN)` of an encoder pretrained on scans like yours, and hundreds of steps.
"""

import sys
import tempfile
from pathlib import Path

from dagman import PreparedStore, embed, finetune, prepare, probe
from dagman.ct import phantom
from dagman.ct.prepare import PrepareConfig
from dagman.nets.encoder import new
from dagman.nets.swin import AttentionConfig, SwinConfig
from dagman.tasks import classifier, comparison, predictions
from dagman.train.classify import ClassifyConfig
from dagman.train.finetune import FinetuneConfig
from dagman.types import Preparation

work = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
sizes = SwinConfig(
    embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2), attention=AttentionConfig(stage=2, num_heads=2)
)
encoder = new(sizes, Preparation(spacing_mm=4.0, window_hu=(-1000.0, 400.0), crop=(32, 32, 32)))

prepare([phantom.write(work / "phantoms", 16)], work / "store", PrepareConfig(spacing_mm=4.0))
store = PreparedStore(work / "store")

linear = probe(embed(encoder, store), positive="malignant")
print(f"linear probe: AUC {linear.auc()}")

learning = FinetuneConfig(steps=10, batch_size=4, check_every=5)
result = finetune(encoder, store, work / "tuned", ClassifyConfig(finetune=learning, positive="malignant"), say=print)
if result is None:
    raise SystemExit("stopped: the same command goes on")
print("\n".join(predictions.lines(result)))

tuned = predictions.read(work / "tuned")
print("\n".join(comparison.lines(comparison.rows({"fine-tuned": tuned, "linear probe": linear}))))

table, called = classifier.predict(classifier.load(work / "tuned"), store)
print(f"{called.count('malignant')} of {len(called)} cases are called malignant; everything lies in {work}")
