import subprocess
import sys
from pathlib import Path

import attncap

SCRIPT = """
import sys, types
from pathlib import Path

folder, output = map(Path, sys.argv[1:])
package = types.ModuleType("attncap")  # without attncap/__init__.py, so that only the modules below are tested
package.__path__ = [str(folder)]
sys.modules |= {"attncap": package, "torch": None, "torchvision": None}  # an import of either fails

import numpy as np
from PIL import Image
from attncap.data.shapes import Object, Scene
from attncap.metrics import bootstrap, score
from attncap.metrics.diversity import diversity
from attncap.metrics.grounding import grounding
from attncap.pictures import draw_curves, save_attention
from attncap.report import as_markdown, as_text, write_page

captions, references = {"1": "a red dog", "2": "a cat"}, {"1": ["a red dog"], "2": ["two cats"]}
scores = score(captions, references)
intervals = bootstrap.intervals(scores)
bootstrap.compare(scores, scores)
metrics = {name: {"value": value, "low": intervals[name][0], "high": intervals[name][1]}
           for name, value in scores.corpus().items()}
report = {"images": 2, "figures": metrics, "captions": diversity([text.split() for text in captions.values()])}
as_text(report), as_markdown(report)
write_page(output / "page.html", report, captions, references, scores, {})

thing = Object("small", "red", "circle", center=(16, 16), radius=12)
attention = np.full((3, 4, 4), 0.01)
attention[:, 0, 0] = 0.5
caption = types.SimpleNamespace(text="small red circle", words=["small", "red", "circle"], attention=attention)
assert grounding(Scene("scene", (thing,), (), (0,)), caption) == (1, 1 / 16)
save_attention(output / "attention.png", [(Image.new("RGB", (60, 40)), caption)])
draw_curves([{"epoch": 1, "loss_words": 1.0}], 0)
"""


def test_metrics_reports_and_pictures_work_without_torch(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(Path(attncap.__file__).parent), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attention.png", "page.html"]
