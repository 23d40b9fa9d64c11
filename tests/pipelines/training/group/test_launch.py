"""The trainer around Ray Train's."""

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from pipelines.training.group.launch import _BridgeTrainer


def test_two_callbacks_of_ray_train_are_left_out_and_no_other(ray_local):
    def names(trainer):
        made = trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        return [type(callback).__name__ for callback in made._create_default_callbacks()]

    usual, ours = names(TorchTrainer), names(_BridgeTrainer)
    unused = {"DatasetsCallback", "PlacementGroupCleanerCallback"}
    assert unused <= {*usual} and ours == [name for name in usual if name not in unused]
