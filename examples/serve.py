"""A photo in, an answer out: a web service of what `vpt export --format onnx` wrote, without vpt and torch.

    MODEL=RUN/model.onnx uvicorn --factory --app-dir examples serve:app
    curl --data-binary @photo.jpg localhost:8000

It takes `pip install fastapi uvicorn onnxruntime pillow`.
"""

import io
import json
import os
from typing import Any

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps


def prepare(photo: bytes, preset: dict[str, Any], size: int | list[int]) -> Any:
    """Decodes a photo of 8 bits: upright, on white, resized as the preset says; uint8 (1, 3, height, width)."""
    if "channels" in preset:
        raise ValueError("the model takes images of channels, which are read by vpt itself")
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(photo)))
    if image.mode[0] in "FI" or max(image.size) > 16 * min(image.size) or preset["interpolation"] == "bilinear_legacy":
        raise ValueError("more than 8 bits, sides of more than 16 to 1, and TensorFlow's resize take vpt itself")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
    height, width = size if isinstance(size, list) else (size, size)
    method = Image.Resampling[preset["interpolation"].upper()]
    wide, high = width, height  # of "square", which ignores the aspect ratio
    if preset["resize"] == "pad":
        share = min(width / image.width, height / image.height)
        wide, high = (max(1, min(round(share * a), b)) for a, b in zip(image.size, (width, height), strict=True))
        page = Image.new("RGB", (width, height), tuple(preset["fill"]))
        page.paste(image.resize((wide, high), method), ((width - wide) // 2, (height - high) // 2))
        return np.asarray(page).transpose(2, 0, 1)[None]
    if preset["resize"] == "shorter_crop":
        least = int(width / preset["crop_fraction"]), int(height / preset["crop_fraction"])
        limit = 0 if least[0] * image.height >= least[1] * image.width else 1
        wide, high = (int(least[limit] * side / image.size[limit]) for side in image.size)
    image = image.resize((wide, high), method)
    left, top = round((wide - width) / 2), round((high - height) / 2)
    pixels = np.asarray(image.crop((left, top, left + width, top + height)))
    return pixels.transpose(2, 0, 1)[None]  # normalisation is in the file


def answer(session: Any, photo: bytes, max_risk: str = "0.05", coverage: str = "0.9") -> dict[str, Any]:
    """Class and probability; of a calibrated model also `declined` and `set`, None where its images did not suffice.

    Of a model of several labels an image those that it sees, with all probabilities; of one of numbers these.
    """
    told = session.get_modelmeta().custom_metadata_map
    names, preset, size = (json.loads(told[key]) for key in ("class_names", "preset", "image_size"))
    known = json.loads(told.get("calibration", '{"temperature": 1}'))
    logits = session.run(["logits"], {"images": prepare(photo, preset, size)})[0][0].astype(np.float64)
    if told.get("targets") == "regression":
        return dict(zip(names, logits.tolist(), strict=True))
    if told.get("targets") == "multilabel":
        chances = dict(zip(names, (1 / (1 + np.exp(-logits))).tolist(), strict=True))
        limits = dict(zip(names, known.get("label_thresholds", [0.5] * len(names)), strict=True))
        return {"labels": [name for name in names if chances[name] >= limits[name]], "probabilities": chances}
    shares = np.exp((logits - logits.max()) / known["temperature"])
    ranked = sorted(zip((shares / shares.sum()).tolist(), names, strict=True), key=lambda pair: -pair[0])
    found = {"class": ranked[0][1], "probability": ranked[0][0]}
    if limits := known.get("thresholds"):
        least, most = limits["max_risk"].get(max_risk), limits["coverage_lac"].get(coverage)
        held = [name for share, name in ranked if 1 - share <= (most or 0)] or [ranked[0][1]]
        found |= {"declined": None if least is None else ranked[0][0] < least, "set": None if most is None else held}
    return found


def app() -> Any:
    """The service: the bytes of a photo are posted to ``/``."""
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool

    session, service = InferenceSession(os.environ["MODEL"]), FastAPI()

    async def read(request: Request) -> Any:
        try:
            return await run_in_threadpool(answer, session, await request.body())
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise HTTPException(422, f"not a photo that can be read: {error}") from error

    service.post("/")(read)
    return service
