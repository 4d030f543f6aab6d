"""Decoding one photograph: the square, every kind of image, refused formats."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from photos import SIZE, colours, write_eps, write_image, write_tiff
from PIL import Image

from cnn_spmd.data import square


@pytest.mark.parametrize(
    ("height", "width"), [(300, 401), (401, 300), (256, 256), (100, 80), (512, 768), (768, 512)]
)
def test_the_shorter_side_is_rescaled_and_the_centre_kept(tmp_path, height, width):
    """The paper rescales to a shorter side of 256, and then cuts out the centre."""
    pixels = colours(height, width)
    if min(height, width) == 512:
        # Rescaled by a whole number, both orders agree on noise too.
        pixels = np.random.default_rng(0).integers(256, size=pixels.shape, dtype=np.uint8)
    image = Image.fromarray(pixels)
    write_image(tmp_path / "image.png", image)
    scale = 256 / min(height, width)
    new_size = round(width * scale), round(height * scale)
    rescaled = np.asarray(image.resize(new_size, Image.Resampling.BILINEAR), int)
    top, left = ((side - 256) // 2 for side in rescaled.shape[:2])
    found = square.decode(tmp_path / "image.png", 256)
    assert found.shape == (256, 256, 3)
    assert np.abs(found - rescaled[top : top + 256, left : left + 256]).max() <= 2


def transparent_palette(image: Image.Image) -> Image.Image:
    image = image.quantize(256)
    image.info["transparency"] = bytes([255] * 256)
    return image


def half_clear(image: Image.Image) -> Image.Image:
    """Return an image whose left half is opaque; the right half is clear, and black below."""
    image = image.convert("RGBA")
    image.paste((0, 0, 0, 0), (SIZE // 2, 0, SIZE, SIZE))
    return image


# By file name: how the image is stored, the mode that it loses nothing beyond, and how far a pixel
# may be from that mode's.
KINDS = {
    "grey.jpg": (lambda image: image.convert("L"), "L", 12),
    "grey.png": (lambda image: image.convert("L"), "L", 0),
    "cmyk.jpg": (lambda image: image.convert("CMYK"), "RGB", 12),
    "palette.png": (lambda image: image.quantize(256), "RGB", 12),
    "transparent.png": (lambda image: image.convert("RGBA"), "RGB", 0),
    "transparent_palette.png": (transparent_palette, "RGB", 12),
    "transparent_grey.png": (lambda image: image.convert("LA"), "L", 0),
    "bits.png": (lambda image: image.convert("1"), "1", 0),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    convert, mode, tolerance = KINDS[name]
    image = Image.fromarray(colours(SIZE, SIZE))
    write_image(tmp_path / name, convert(image))
    found = square.decode(tmp_path / name, SIZE).astype(int)
    assert found.shape == (SIZE, SIZE, 3)
    expected = np.asarray(image.convert(mode).convert("RGB"), int)
    assert np.abs(found - expected).max() <= tolerance
    with square.opened(tmp_path / name) as opened:
        assert not square.is_transparent(opened)


def test_white_is_behind_a_transparent_image(tmp_path):
    """As a colour is mixed with white; an opaque pixel stays as it is."""
    image = Image.fromarray(colours(SIZE, SIZE))
    for name, made in (
        ("colour.png", half_clear(image)),
        ("grey.png", half_clear(image).convert("LA")),
        ("palette.png", half_clear(image).quantize(256)),
    ):
        write_image(tmp_path / name, made)
        with square.opened(tmp_path / name) as opened:
            found = square.pixels_of(opened, SIZE)
            assert square.is_transparent(opened)
        assert (found[:, SIZE // 2 :] == 255).all()
        if name == "colour.png":
            np.testing.assert_array_equal(found[:, : SIZE // 2], np.asarray(image)[:, : SIZE // 2])
    Image.new("RGBA", (SIZE, SIZE), (0, 100, 200, 51)).save(tmp_path / "pale.png")
    assert square.decode(tmp_path / "pale.png", SIZE)[0, 0].tolist() == [204, 224, 244]


def write_png16(path: Path, values_HWC: np.ndarray) -> None:
    """Write 16-bit grey (one channel) or colour (three), which Pillow cannot write."""

    def block(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, channels = values_HWC.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)
    blocks = block(b"IHDR", header) + block(b"IDAT", zlib.compress(rows)) + block(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + blocks)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(tmp_path, channels):
    values = np.random.default_rng(0).integers(1 << 16, size=(SIZE, SIZE, channels))
    write_png16(tmp_path / "deep.png", values)
    expected = np.broadcast_to(values >> 8, (SIZE, SIZE, 3))
    np.testing.assert_array_equal(square.decode(tmp_path / "deep.png", SIZE), expected)


def write_gif(path: Path) -> None:
    Image.new("RGB", (20, 20)).save(path, "gif")


@pytest.mark.parametrize("write", [write_tiff, write_eps, write_gif])
def test_an_image_of_another_format_is_refused_whatever_its_name(tmp_path, write):
    write(tmp_path / "a.png")
    for file in (tmp_path / "a.png", io.BytesIO((tmp_path / "a.png").read_bytes())):
        with pytest.raises(ValueError, match=r"^is no JPEG, PNG or WebP image$"):
            square.decode(file, SIZE)
