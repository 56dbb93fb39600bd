"""`crossmodal predict` of points: a label for each, a coloured file and a picture from above."""

from collections import Counter

from .console import note, print_json


def label_points(model, processor, points, image, output, picture, up, as_json):
    """Labels the points of a file by a model, and prints how many have which label."""
    from ..processing.pipeline_crossmodal import CrossModalPointSegmentationPipeline

    if points is None:
        raise ValueError("this model labels points, and none were given. Pass --points FILE (.ply, .npz or .npy).")
    pipe = CrossModalPointSegmentationPipeline(model=model.eval(), processor=processor)
    sample = {"points": points} | ({} if image is None else {"image": image})
    found = pipe(sample, output=output, picture=picture, up=up)
    counts = dict(Counter(found["labels"]).most_common())
    for name, path in (("points", output), ("picture", picture)):
        if path is not None:
            note(f"{name}: {path}")
    if as_json:
        plain = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in found.items()}
        print_json(plain | {"points": counts})
        return
    for label, count in counts.items():
        print(f"{count:8,} points  {label}  (somewhere in the scene: {found['scene'][label]:.0%})")
