"""Cut the photographs that scikit-image and scikit-learn ship into a folder of training pictures.

    python experiments/photos.py photos
    umm train --task recon --config configs/tiny/photos.yaml data.root=photos

Whole photographs are held out: no crop of a validation or test photograph is ever trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image

# photograph -> split; grey scans, text and synthetic pictures are left out
PHOTOGRAPHS = {
    "train": ["astronaut", "coffee", "hubble_deep_field", "ihc", "motorcycle_left", "retina", "brick", "grass",
              "gravel", "moon", "coins", "china"],
    "val": ["chelsea", "camera"],
    "test": ["rocket", "flower"],
}  # fmt: skip
SIZES = (96, 160)  # sides of the crops, pixels
STRIDE = 0.5  # of the side


def find(name: str) -> Path:
    """The file of a photograph inside an installed package."""
    import skimage
    import sklearn

    folders = [Path(skimage.__file__).parent / "data", Path(sklearn.__file__).parent / "datasets" / "images"]
    return next(file for folder in folders for file in folder.glob(f"{name}.*"))


def crops(picture: Image.Image) -> list[Image.Image]:
    """Squares of every size, half overlapping."""
    found = []
    for side in SIZES:
        step = int(side * STRIDE)
        corners = [
            (x, y) for y in range(0, picture.height - side + 1, step) for x in range(0, picture.width - side + 1, step)
        ]
        found += [picture.crop((x, y, x + side, y + side)) for x, y in corners]
    return found


def main(out: str) -> None:
    for split, names in PHOTOGRAPHS.items():
        count = 0
        for name in names:
            folder = Path(out) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number, crop in enumerate(crops(Image.open(find(name)).convert("RGB"))):
                crop.save(folder / f"{number:04d}.png")
                count += 1
        print(f"{split}: {count} pictures of {len(names)} photographs")


if __name__ == "__main__":
    main(*sys.argv[1:])
