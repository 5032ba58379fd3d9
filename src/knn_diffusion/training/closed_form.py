"""What is added to a trained encoder in closed form: the looks, and a text head that puts a caption where its pictures lie.

A contrastive loss leaves captions and pictures apart: it is content when the right one comes first among a batch. Here the
mean picture vector of a caption is estimated instead: by remembered plain captions (what is shown), and by a ridge
regression of what these leave unexplained (background, tint, relation). The looks are principal components of thumbnails.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from knn_diffusion import images
from knn_diffusion.device import choose_dtype
from knn_diffusion.models.small_encoder import CaptionMemory, Looks, SmallEncoder
from knn_diffusion.training.captioned import CaptionedImages

MOST_ANCHORS = 4096
SHARED_BY = 2
RIDGE = 1e-4
LOOKS_FLOOR = 1e-4
"""Added to each component's variance before whitening, as a share of the whole."""
AT_ONCE = 128


@torch.inference_mode()
def fitted(network: SmallEncoder, pairs: CaptionedImages, looks: int = 0) -> SmallEncoder:
    """An encoder with the same image tower, `looks` coordinates beside it, and a text head fitted to these pictures.

    Remembered are the plainest captions that at least two pictures share, the most frequent first. Without any such
    caption the text head stays as it was trained, and texts say nothing of looks.
    """
    kept = _anchors(pairs.caption_rows[:, 0])
    cfg = network.config
    with torch.random.fork_rng(devices=[]):
        made = SmallEncoder(replace(cfg, dim=cfg.meaning + looks, looks=looks, anchors=len(kept)))
    made.to(network.text_head.weight.device)
    made.image_tower.load_state_dict(network.image_tower.state_dict())
    if made.looks is not None:
        _fit_looks(made.looks, pairs)
    if made.memory is None:
        return _with_head_of(network, made)
    places = _embedded(made, pairs)
    mean = places.mean(0)
    sentences = torch.from_numpy(np.asarray(pairs.sentences, np.float32))
    made.cpu()
    _fill(made.memory, sentences[kept], _mean_places(places - mean, pairs.caption_rows[:, 0], kept))
    texts = sentences[pairs.caption_rows.astype(np.int64)].flatten(0, 1)
    told = torch.cat([made.memory(some) for some in texts.split(4096)])
    left = (places - mean).repeat_interleave(pairs.caption_rows.shape[1], 0) - told
    weight, bias = _ridge(texts, left)
    # What a thing looks like is for the index to say, not for the text: background and tint remain, by the regression.
    made.memory.places[:, made.config.meaning :] = 0
    made.text_head.weight.copy_(weight)
    made.text_head.bias.copy_(bias + mean)
    return made.to(network.text_head.weight.device)


def _with_head_of(network: SmallEncoder, made: SmallEncoder) -> SmallEncoder:
    meaning = made.config.meaning
    for to, trained in zip(made.text_head.parameters(), network.text_head.parameters(), strict=True):
        to.zero_()
        to[:meaning].copy_(trained[:meaning])
    return made


def _principal(covariance: Float[Tensor, "dim dim"]) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim dim"]]:
    """Variances along the principal axes, largest first, and the axes as columns."""
    values, vectors = torch.linalg.eigh(covariance)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _fit_looks(looks: Looks, pairs: CaptionedImages) -> None:
    """Take the thumbnails' principal components; those that hardly vary are not blown up to the size of the others."""
    width = len(looks.center)
    total = torch.zeros(width, dtype=torch.float64)
    squares = torch.zeros(width, width, dtype=torch.float64)
    for start in range(0, len(pairs), AT_ONCE):
        pixels = images.pixels_from_uint8(np.asarray(pairs.pixels[start : start + AT_ONCE]))
        rows = looks.thumbnails(pixels).double()
        total += rows.sum(0)
        squares += rows.T @ rows
    center = total / len(pairs)
    values, vectors = _principal(squares / len(pairs) - torch.outer(center, center))
    count = len(looks.project)
    scale = (values[:count] + LOOKS_FLOOR * values.sum()).rsqrt()
    looks.center.copy_(center)
    looks.project.copy_((vectors[:, :count] * scale).T)


def _anchors(plain: Int[np.ndarray, "items"]) -> Int[np.ndarray, "anchors"]:
    rows, counts = np.unique(plain, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return rows[order[counts[order] >= SHARED_BY]][:MOST_ANCHORS].astype(np.int64)


def _embedded(network: SmallEncoder, pairs: CaptionedImages) -> Float[Tensor, "items dim"]:
    device = network.text_head.weight.device
    bfloat16 = choose_dtype(device) == torch.bfloat16
    rows = []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16):
        for start in range(0, len(pairs), AT_ONCE):
            pixels = images.pixels_from_uint8(np.asarray(pairs.pixels[start : start + AT_ONCE]))
            rows.append(network.embed_images(pixels.to(device)).cpu())
    return torch.cat(rows)


def _mean_places(
    places: Float[Tensor, "items dim"], plain: Int[np.ndarray, "items"], kept: Int[np.ndarray, "anchors"]
) -> Float[Tensor, "anchors dim"]:
    """Mean place of the pictures of each kept caption."""
    slot_of = {int(row): slot for slot, row in enumerate(kept)}
    slots = torch.tensor([slot_of.get(int(row), len(kept)) for row in plain])
    total = torch.zeros(len(kept) + 1, places.shape[1]).index_add_(0, slots, places)
    return (total / torch.bincount(slots, minlength=len(kept) + 1).clamp_min(1)[:, None])[: len(kept)]


def _fill(
    memory: CaptionMemory, sentences: Float[Tensor, "anchors text_width"], places: Float[Tensor, "anchors dim"]
) -> None:
    """Remember these captions; they are compared along their principal components, half-whitened.

    So no trait that many captions share, such as naming an animal, drowns the others.
    """
    center = sentences.double().mean(0)
    values, vectors = _principal((sentences.double() - center).T @ (sentences.double() - center) / len(sentences))
    width = len(memory.project)
    values, vectors = values[:width], vectors[:, :width]
    memory.center.copy_(center)
    memory.project.copy_((vectors * (values + 1e-3 * values.mean()) ** -0.25).T)
    memory.keys.copy_(memory.compared(sentences))
    memory.places.copy_(places)


def _ridge(
    x: Float[Tensor, "texts text_width"], y: Float[Tensor, "texts dim"]
) -> tuple[Float[Tensor, "dim text_width"], Float[Tensor, "dim"]]:
    """Weight and bias of the ridge regression of y on x."""
    x_mean, y_mean = x.double().mean(0), y.double().mean(0)
    centered = x.double() - x_mean
    gram = centered.T @ centered / len(x) + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, centered.T @ (y.double() - y_mean) / len(x)).T
    return weight.float(), (y_mean - weight @ x_mean).float()
