"""Decode one photograph into a square of pixels."""

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow reads many more formats. We refuse those: an EPS file is a program that Ghostscript would
# run, and a TIFF file may hold numbers that are not pixels.
FORMATS = ("JPEG", "PNG", "WEBP")

# Pillow warns of a very large image without saying which. We ignore the warning. Above twice that
# size, Pillow raises an error, which is reported with the image's name.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(file: str | io.BytesIO, size: int) -> np.ndarray:
    """Return `pixels_of` an image in a file. Raises as `opened` and `pixels_of`."""
    with opened(file) as image:
        return pixels_of(image, size)


def pixels_of(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an opened image, rescaled to uint8 [size, size, 3].

    The filter is bilinear, with antialiasing. Grey, palette, CMYK and 16-bit images become RGB.
    White is behind a transparent image. A camera's orientation (EXIF) is ignored, as in TFDS's and
    torchvision's readers. Raises Pillow's errors for a damaged file.
    Source: Krizhevsky et al. 2012, section 2, rescales the shorter side and keeps the centre.
    """
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow reads 16-bit colour as 8 bits by itself.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode != "RGB":  # which would be copied
        image = image.convert("RGB")
    return fit(image, size)


def opened(file: str | Path | io.BytesIO) -> Image.Image:
    """Return an image whose pixels are not decoded yet.

    The content decides what a file is, not its name. Raises ValueError for another format.
    """
    try:
        return Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError("is no JPEG, PNG or WebP image") from None


def is_transparent(image: Image.Image) -> bool:
    """Return whether `pixels_of` puts white behind a pixel of an image."""
    if image.mode.startswith("I") or not image.has_transparency_data:
        return False
    return image.convert("RGBA").getextrema()[3][0] < 255


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Return the central square of an RGB image, rescaled to uint8 [size, size, 3]."""
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR))
