"""The networks, by the names that `model.name` takes."""

from covid_flax.models.resnet import RESNET14_SMALL, RESNET50, RESNET50_V1_5, STAGES, ResNet

MODELS = {
    "resnet50": RESNET50,
    "resnet50_v1_5": RESNET50_V1_5,
    "resnet14_small": RESNET14_SMALL,
}

__all__ = ["MODELS", "STAGES", "ResNet"]
