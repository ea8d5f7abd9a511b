from __future__ import annotations

import json
from pathlib import Path

from lora_pipeline.data.images import open_picture
from lora_pipeline.pretrained.components import Components
from lora_pipeline.rendering.picture_set import PictureSet, write_set
from lora_pipeline.rendering.records import read_recipe


def test_every_prompt_is_drawn_from_every_seed_and_says_how(components: Components, tmp_path: Path) -> None:
    pictures = PictureSet(["a creature", "a dog"], ["a dog"], [1, 2], 2, 1.0, "")
    write_set(components, pictures, None, {"base": "b"}, tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "metadata.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["seed"], row["role"]) for row in rows] == [
        ("a creature", 1, "prompt"), ("a creature", 2, "prompt"), ("a dog", 1, "prompt"), ("a dog", 2, "prompt"),
        ("a dog", 1, "class"), ("a dog", 2, "class"),
    ]  # fmt: skip
    for row in rows:
        recipe = read_recipe(tmp_path / "out" / row.pop("file_name"))
        settings = {"steps": 2, "guidance_scale": 1.0, "guidance_rescale": 0.0, "negative_prompt": ""}
        assert recipe == {"base": "b", **settings, **row}
    prompted, classed = (open_picture(tmp_path / "out" / "images" / name) for name in ("0002.png", "0004.png"))
    assert prompted.tobytes() == classed.tobytes()
    assert open_picture(tmp_path / "out" / "sheet.png").height > 3 * 128
