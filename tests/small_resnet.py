"""The network of the tests that need batch norm."""


def with_batch_norm(c):
    """The small ResNet instead, its last stage trained: the rest only takes time to compile."""
    c.model.name = "resnet14_small"
    c.model.hidden_units = 16
    c.model.bn_momentum = 0.9
    c.model.trainable = "conv5"
    return c
