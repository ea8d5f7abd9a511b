"""Pictures as users have them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lora_pipeline.data.images import list_pictures, open_picture
from lora_pipeline.errors import CorruptError, MissingError


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_orientation_of_the_camera_is_undone(tmp_path: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "a.png")), np.rot90(pixels, k=-1))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").getpixel((0, 0)) == (255, 204, 204)


def test_sixteen_bit_grey_keeps_its_tones(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(np.asarray(open_picture(tmp_path / "a.png"))[0, :, 0], [0, 100, 255], atol=1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp"])
def test_truncated_pictures_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.0, 0.1, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CorruptError, match=f"a.{suffix}"):
            open_picture(path)


@pytest.mark.parametrize("side", [10_000, 100_000])
def test_giant_headers_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(CorruptError, match="too many pixels"):
        open_picture(tmp_path / "a.png")


def test_pictures_are_listed_in_order_and_nothing_is_left_out_silently(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "a.txt", ".hidden"):
        (tmp_path / name).touch()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.jpg", "b.PNG"]
    (tmp_path / "c.heic").touch()
    with pytest.raises(CorruptError, match=r"c\.heic"):
        list_pictures(tmp_path)


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no picture"):
        list_pictures(tmp_path)
    with pytest.raises(MissingError, match="is no folder"):
        list_pictures(tmp_path / "none")
