"""A user's code, for the type checker. `mypy` accepts these lines and reports those marked `type: ignore`."""

from pathlib import Path

import numpy as np
from PIL import Image

from attncap import Caption, Captioner, Ensemble, SearchConfig, UserError
from attncap.data import CaptionedImage, open_dataset

model = Captioner.from_pretrained(Path("runs/shapes"), device="cpu")
search = SearchConfig(beam_size=3, length_penalty="average", suppressed=("<unk>", "a"))

caption = model.caption("photo.jpg", beam_size=5)
text: str = caption.text
score: float = caption.score
text = caption.title  # type: ignore[union-attr]
if caption.attention is not None:
    shape: tuple[int, ...] = caption.attention.shape

for best in model.caption(Image.new("RGB", (8, 8)), search, n_best=2):
    text = best.text

several: list[Caption] = model.caption([Path("a.jpg"), b"", np.zeros((8, 8, 3), np.uint8)], search, batch_size=8)
text = several.text  # type: ignore[attr-defined]
texts = [one.text for one in Ensemble([model, model]).caption(["a.jpg", "b.jpg"])]
for one in model.caption(["a.jpg"], errors="return"):
    text = str(one) if isinstance(one, UserError) else one.text

model.caption(3)  # type: ignore[call-overload]
SearchConfig(beam_size="3")  # type: ignore[arg-type]

splits = open_dataset(Path("data/flickr8k"), seed=0)
examples: list[CaptionedImage] = list(splits["test"])
model.caption([example.image() for example in examples])
