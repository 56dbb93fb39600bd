"""Files and arrays to what the processor works on: RGB images, waveforms at a rate, frames of a video.

Shipped to the Hub beside the weights: imports only torch, transformers, numpy and sibling files; others where they are there.
"""

import io
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers.image_utils import load_image
from transformers.video_utils import load_video


try:
    from PIL import Image
except ImportError:
    # A model without images loads where there is none.
    Image = None


def read_sound(source, where="sound file"):
    """`{"array": (samples,) float32, "sampling_rate": Hz}` of a sound file: its path, its bytes, or a dict with either. Channels are
    averaged.

    Raises:
        ValueError: if soundfile is not installed, or cannot read it.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ValueError("sound files are read with soundfile. Install it with `pip install soundfile`.") from error
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    try:
        array, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32")
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise ValueError(f"{where}: not readable as sound: {error}") from error
    return {"array": array if array.ndim == 1 else array.mean(axis=1), "sampling_rate": rate}


def read_numbers(value, where, dtype=np.float32):
    """An array, a tensor, or lists of numbers as an array of `dtype`.

    Raises:
        ValueError: naming `where`, for lists of unequal lengths and for what holds no (real) numbers.
    """
    try:
        if torch.is_tensor(value):
            value = value.detach().cpu()
            # NumPy has no bfloat16.
            value = value.float() if value.is_floating_point() and value.dtype != torch.float64 else value
        array = np.asarray(value)
        if array.dtype.kind not in "biufO":
            raise TypeError(f"they are of type {array.dtype}")
        return array.astype(dtype, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} are no numbers: {error}. Expected an array, or lists of equal lengths.") from error


def read_wave(value, where):
    """Samples as float32. Whole numbers of 16 or 32 bits, as WAV files hold them, become -1 to 1, as files are read.

    Raises:
        ValueError: naming `where`, for what holds no numbers.
    """
    wave, kind = read_numbers(value, where), str(getattr(value, "dtype", "")).removeprefix("torch.")
    return wave / np.float32(2 ** (int(kind[3:]) - 1)) if kind in ("int16", "int32") else wave


def checked_rate(rate):
    """A sampling rate in Hz, as a number.

    Raises:
        ValueError: for anything that is not above 0.
    """
    try:
        found = float(rate)
    except (TypeError, ValueError):
        found = 0.0
    if not 0 < found < math.inf:
        raise ValueError(f"sampling_rate={rate!r}. Expected Hz, above 0.")
    return found


def resample(wave, rate, wanted):
    """A waveform (samples,) of `rate` Hz at `wanted` Hz, by a polyphase filter.

    Raises:
        ValueError: for rates that are none, or if scipy is not installed.
    """
    rate = checked_rate(rate)
    if int(rate) == int(wanted):
        return wave
    scipy, shared = (
        scipy_signal(f"a signal of {rate:g} Hz is resampled to the model's {wanted} Hz"),
        math.gcd(int(rate), int(wanted)),
    )
    return scipy.resample_poly(wave, int(wanted) // shared, int(rate) // shared).astype(np.float32)


def scipy_signal(what):
    """The module scipy.signal. what: is done with it, for the error where it is not installed."""
    try:
        import scipy.signal
    except ImportError as error:
        raise ValueError(f"{what} with scipy. Install it with `pip install scipy`.") from error
    return scipy.signal


def evenly(count, wanted):
    """Numbers of `wanted` frames of `count`, the middles of as many equal parts; some more than once where there are fewer."""
    return [min(count - 1, int((part + 0.5) * count / wanted)) for part in range(wanted)]


def in_the_middle(count, wanted):
    """Numbers of `wanted` frames of `count` that follow one another, from the middle; all where there are fewer."""
    first = max(0, (count - wanted) // 2)
    return list(range(first, min(count, first + wanted)))


# What a modality of video may call `frame_sampling`.
FRAME_SAMPLINGS = {"uniform": evenly, "window": in_the_middle}


def read_video(source, where="video", wanted=None, sampling=evenly):
    """Frames (T,H,W,3) uint8 of a video file by its path, URL or bytes; arrays as they are.

    Args:
        wanted: how many frames are read, None: all. sampling: (frames there are, wanted) to the numbers of those to take.

    Raises:
        ValueError: if none of PyAV, OpenCV and torchcodec is installed, or none can read it.
    """
    if isinstance(source, bytes):
        with tempfile.NamedTemporaryFile(suffix=".video") as file:
            file.write(source)
            file.flush()
            return read_video(file.name, where, wanted, sampling)
    if not isinstance(source, str | Path):
        frames = np.asarray(source.detach().cpu() if torch.is_tensor(source) else source)
        if frames.ndim != 4 or frames.shape[0] == 0:
            raise ValueError(
                f"{where} has shape {frames.shape}. Expected frames (T,H,W,3), images, or the path of a file."
            )
        return frames

    def chosen(metadata, **_):
        count = metadata.total_num_frames
        return np.arange(count) if wanted is None else np.array(sampling(count, wanted))

    missing = []
    for backend, package in (("pyav", "av"), ("opencv", "opencv-python"), ("torchcodec", "torchcodec")):
        try:
            frames, _ = load_video(str(source), backend=backend, sample_indices_fn=chosen)
        except ImportError:
            missing.append(package)
            continue
        # Each backend has errors of its own for a broken file.
        except Exception as error:
            raise ValueError(f"{where} ({str(source):.200}) cannot be read: {error}") from error
        frames = np.asarray(frames)
        if len(frames) == 0:
            raise ValueError(f"{where} ({str(source):.200}) has no readable frame.")
        # A backend may give each frame once.
        return frames if wanted is None or len(frames) == wanted else frames[sampling(len(frames), wanted)]
    raise ValueError(f"video files are read with one of {missing}. Install one, or give lists of frames.")


def read_image(item, where="image"):
    """An RGB PIL image from a PIL image, path, URL, bytes, `{"bytes": ...}`, array or tensor.

    Raises:
        ValueError: saying what could not be read and what to give instead.
    """
    if Image is None:
        raise ValueError(f"{where} cannot be read without Pillow. Install it with `pip install pillow`.")
    source = item
    if isinstance(item, dict):
        item = item.get("bytes") or item.get("path")
    try:
        if isinstance(item, bytes):
            item = Image.open(io.BytesIO(item))
        elif isinstance(item, str | Path):
            item = load_image(str(item))
        elif torch.is_tensor(item) or isinstance(item, np.ndarray):
            item = _image_from_array(np.asarray(item.detach().cpu() if torch.is_tensor(item) else item))
        if not isinstance(item, Image.Image):
            raise TypeError(f"got {type(item).__name__}")
        if min(item.size) == 0:
            raise OSError(f"its size is {item.size[0]} x {item.size[1]} pixels")
        return item.convert("RGB")
    # PIL raises SyntaxError and struct.error too on broken files.
    except Exception as error:
        given = repr(source) if isinstance(source, str | Path) else type(source).__name__
        raise ValueError(
            f"{where} ({given:.200}) cannot be read: {str(error).splitlines()[0] if str(error) else error!r}. Expected a "
            "PIL image, the path or URL of an image file, its bytes, or an array (H,W,3), or None for a row without it."
        ) from error


def _image_from_array(array):
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f"an array of shape {array.shape} is no image")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
            raise ValueError("its values lie outside 0 to 255 (or 0 to 1)")
        scale = 255.0 if np.issubdtype(array.dtype, np.floating) and array.max() <= 1 else 1.0
        array = np.rint(array * scale).astype(np.uint8)
    return Image.fromarray(array)
