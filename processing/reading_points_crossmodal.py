"""Points: from files and arrays to what the processor works on, and labelled ones back to files and pictures.

Letters: N points, V views, F numbers per point.
Shipped to the Hub beside the weights: imports only torch, transformers, numpy and sibling files; plyfile and matplotlib where they are
there.
"""

import colorsys
from pathlib import Path

import numpy as np

from .reading_crossmodal import read_numbers


POINT_KEYS = ("coordinates", "colors", "features", "uv", "segments")
# Names that the same things have in files of others.
_ALIASES = {
    "points": "coordinates",
    "xyz": "coordinates",
    "coord": "coordinates",
    "pos": "coordinates",
    "color": "colors",
}
_ALIASES |= {"colours": "colors", "rgb": "colors", "segment_ids": "segments"}


def read_points(source, where="points"):
    """`{"coordinates": (N,3) float32, "colors": (N,3) from 0 to 1, "features": (N,K), "uv": (N,V,2), "segments": (N,) long}`, of which all
    but the first may be missing, from such a dict (colours from 0 to 255 too, uv (N,2) of a single view), an array (N,F) of coordinates
    and features, or a `.npz`, `.npy` or `.ply` file.

    Raises:
        ValueError: for points without coordinates, NaN, a single point, parts of other lengths, and files that cannot be read.
    """
    if isinstance(source, str | Path):
        where, source = f"{where} ({str(source):.200})", _read_file(source, where)
    if not isinstance(source, dict):
        array = read_numbers(source, where)
        if array.ndim != 2 or array.shape[1] < 3:
            raise ValueError(
                f"{where}: an array of shape {array.shape}. Expected (points, 3 or more): coordinates, then features."
            )
        source = {"coordinates": array[:, :3]} | ({"features": array[:, 3:]} if array.shape[1] > 3 else {})
    given = {_ALIASES.get(key, key): value for key, value in source.items() if value is not None}
    if "coordinates" not in given:
        raise ValueError(
            f"{where} has no coordinates: it has {sorted(source)}. Expected 'coordinates' (N,3) and any of {list(POINT_KEYS[1:])}; of a "
            ".ply file its properties x, y and z."
        )
    read = {key: read_numbers(given[key], f"{key} of {where}") for key in POINT_KEYS if key in given}
    coordinates = read["coordinates"]
    if coordinates.ndim != 2 or coordinates.shape[1] != 3:
        raise ValueError(f"the coordinates of {where} have shape {coordinates.shape}. Expected (points, 3).")
    if len(coordinates) < 2:
        raise ValueError(
            f"{where} has {len(coordinates)} point{'s' * (len(coordinates) != 1)}. Expected at least 2 of a scene."
        )
    for key, value in read.items():
        if len(value) != len(coordinates):
            raise ValueError(
                f"{key} of {where} are {len(value)}, and there are {len(coordinates)} points. Give one for each."
            )
        # Where a view does not see a point, uv may be anything.
        if key != "uv" and not np.isfinite(value).all():
            raise ValueError(f"{key} of {where} contain NaN or infinity. Leave those points out.")
    if "colors" in read and read["colors"].max() > 1:
        read["colors"] = read["colors"] / 255
    if "uv" in read:
        uv = read["uv"][:, None] if read["uv"].ndim == 2 else read["uv"]
        if uv.ndim != 3 or uv.shape[2] != 2:
            raise ValueError(
                f"uv of {where} have shape {read['uv'].shape}. Expected (points, 2) or (points, views, 2)."
            )
        read["uv"] = np.nan_to_num(uv, nan=-1.0, posinf=-1.0, neginf=-1.0)
    if "segments" in read:
        # Numbered from 0 without gaps, whatever they were called.
        read["segments"] = np.unique(read["segments"].reshape(-1), return_inverse=True)[1].astype(np.int64)
    return read


def _read_file(path, where):
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{where}: there is no file {str(path)!r}.")
    if path.suffix == ".ply":
        return _read_ply(path, where)
    if path.suffix not in (".npz", ".npy"):
        raise ValueError(f"{where}: {path.name!r} is none of .ply, .npz, .npy. Convert it to one of these.")
    try:
        loaded = np.load(path, allow_pickle=False)
        return {key: loaded[key] for key in loaded.files} if path.suffix == ".npz" else loaded
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: {path.name!r} cannot be read: {error}") from error


def _plyfile():
    try:
        import plyfile
    except ImportError as error:
        raise ValueError(
            ".ply files are read and written with plyfile. Install it with `pip install plyfile`."
        ) from error
    return plyfile


def _read_ply(path, where):
    """Vertices of a PLY file, ASCII or binary: x, y, z, and red, green, blue where it has them."""
    plyfile = _plyfile()
    try:
        vertices = plyfile.PlyData.read(str(path))["vertex"].data
    except (plyfile.PlyParseError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{where}: {path.name!r} cannot be read as PLY: {error}") from error
    found = {}
    for key, names in (("coordinates", ("x", "y", "z")), ("colors", ("red", "green", "blue"))):
        if all(name in vertices.dtype.names for name in names):
            found[key] = np.stack([vertices[name].astype(np.float32) for name in names], axis=1)
    return found


def point_values(points, feature_size, where="points"):
    """(N,F) float32 of what `read_points` gave: coordinates, then colours from -1 to 1 and features, as far as the model reads them.

    Raises:
        ValueError: where the model reads more, or other, than there is.
    """
    parts = [points["coordinates"]]
    if feature_size > 3 and "colors" in points:
        parts.append(2 * points["colors"] - 1)
    if "features" in points and sum(part.shape[1] for part in parts) < feature_size:
        parts.append(points["features"])
    values = np.concatenate(parts, axis=1)
    if values.shape[1] != feature_size:
        kinds = [key for key in ("coordinates", "colors", "features") if key in points]
        raise ValueError(
            f"{where} have {values.shape[1]} numbers each ({', '.join(kinds)}), and this model reads {feature_size}: coordinates"
            f"{' and colours' if feature_size == 6 else ''}{' and others' if feature_size not in (3, 6) else ''}. Give those."
        )
    return values.astype(np.float32)


def class_colors(count):
    """Colours (count,3) uint8 that are told apart: hues of the golden ratio, of three lightnesses."""
    colors = [colorsys.hls_to_rgb((0.11 + 0.618034 * n) % 1.0, (0.5, 0.35, 0.65)[n % 3], 0.75) for n in range(count)]
    return np.round(255 * np.array(colors)).astype(np.uint8).reshape(-1, 3)


def write_labelled_ply(path, coordinates, label_ids, labels):
    """Points (N,3) with their class ids (N,) as a coloured PLY file, whole or not at all; the names of the classes are comments in it."""
    plyfile, path = _plyfile(), Path(path)
    vertices = np.empty(
        len(coordinates),
        [(n, "f4") for n in "xyz"] + [(n, "u1") for n in ("red", "green", "blue")] + [("label", "i4")],
    )
    for axis, name in enumerate("xyz"):
        vertices[name] = coordinates[:, axis]
    colors = class_colors(len(labels))
    for axis, name in enumerate(("red", "green", "blue")):
        vertices[name] = colors[label_ids, axis]
    vertices["label"] = label_ids
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.writing")
    element = plyfile.PlyElement.describe(vertices, "vertex")
    comments = [f"label {index} {name}" for index, name in enumerate(labels)]
    plyfile.PlyData([element], byte_order="<", comments=comments).write(str(aside))
    aside.replace(path)
    return path


def draw_from_above(path, coordinates, label_ids, labels, up="z"):
    """A picture of points (N,3) seen from above, in the colours of their classes, with a legend of those that there are.

    up: the axis that points up, or "-y" and so on where it points down (cameras: "-y"). Returns the path written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures are drawn with matplotlib. Install it with `pip install matplotlib`.") from error
    axis = "xyz".find(up[-1:])
    if axis < 0 or up[:-1] not in ("", "-"):
        raise ValueError(f"up={up!r}. Expected one of x, y, z, -x, -y, -z.")
    height = coordinates[:, axis] * (-1 if up.startswith("-") else 1)
    across, along = (coordinates[:, n] for n in range(3) if n != axis)
    # What is on top is drawn last.
    order = np.argsort(height, kind="stable")
    colors = class_colors(len(labels)) / 255
    figure = Figure(figsize=(7.5, 6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    axes.scatter(across[order], along[order], s=4, c=colors[label_ids[order]], linewidths=0)
    for index in np.unique(label_ids):
        axes.scatter([], [], s=24, color=colors[index], label=f"{labels[index]} ({int((label_ids == index).sum()):,})")
    axes.set_aspect("equal")
    names = [name for n, name in enumerate("xyz") if n != axis]
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.set_title("from above", loc="left", fontsize=9)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
