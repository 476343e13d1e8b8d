"""Sun 2024 as far as the paper says, Keras's defaults where it does not.

ResNet50 with ImageNet weights, Dense 1024 ReLU, dropout 0.5, Dense 4; Adam at 1e-5; up to
100 epochs with early stopping; 80:20 into training and validation. Variants, as
`--config=configs/paper.py:frozen`:

  frozen   only the head is trained, batch norm in inference mode: the paper's slow
           curve looks like this
  caffe    the preprocessing that Keras's weights were trained with, not /255
  resize   to 224 first, then to 128, as the paper's text has both sizes
  random   the 80:20 split drawn at random instead of by file name
  nested   the paper's validation images become a test set that chooses nothing

Variants combine: `paper.py:frozen,nested`.

What the paper got wrong or left out, beside the keys below: the title says CT, the images are
X-rays; its Table 1 gives the hidden layer 1,049,600 parameters, which fits 1,024 inputs, but
ResNet50 has 2,048 (2,098,176); its loss is a sum over classes, here the mean over images of
the same; the images that stop the training are most likely those it reports on (it names no
others), so the figure is optimistic (`nested` measures them without that). That it used Keras is
inferred too: from its table of layers and the counts of its split.
"""

from ml_collections_configs import base

VARIANTS = ("frozen", "caffe", "resize", "random", "nested")


def get_config(variants: str = ""):
    c = base.get_config()
    c.data.split = "paper-sorted"  # 4,232 validation images fit ImageDataGenerator's floors
    c.data.val_fraction = 0.2  # "80:20"
    c.data.image_size = 128  # "input 128x128x3"
    c.data.interpolation = "nearest"  # unstated: the Keras generator's default
    c.data.intermediate_size = 0  # the text resizes to 224, the network takes 128: see `resize`
    c.model.name = "resnet50"
    c.model.weights = "imagenet"
    c.model.preprocessing = "unit"  # "dividing by 255", though these weights expect caffe
    c.model.hidden_units = 1024  # "1024 units, ReLU"
    c.model.dropout = 0.5  # "Dropout (0.5)"
    c.model.trainable = "all"  # "retained ... to allow for further fine-tuning"
    c.model.batch_norm = "train"  # unstated: what Keras does where everything is trainable
    c.optimizer.learning_rate = 1e-5  # "adjusted to 0.00001"
    c.optimizer.schedule = "constant"  # none mentioned
    c.optimizer.epsilon_mode = "keras"  # Keras, by its table of layers
    c.train.epochs = 100  # "for 100 epochs, with early stopping"
    c.train.batch_size = 32  # unstated: Keras's default
    c.train.patience = 10  # unstated, and Keras has no default that stops: our choice
    c.train.monitor = "val_loss"  # unstated: Keras's default
    c.train.class_weights = "none"  # none mentioned; nor augmentation, nor a seed
    c.train.last_batch = "keep"  # as Keras

    for variant in filter(None, variants.split(",")):
        if variant == "frozen":
            c.model.trainable = "head"
        elif variant == "caffe":
            c.model.preprocessing = "caffe"
        elif variant == "resize":
            c.data.intermediate_size = 224
        elif variant == "random":
            c.data.split = "paper-random"
        elif variant == "nested":
            c.data.nested_test = True
        else:
            raise ValueError(f"paper.py has no variant {variant!r}: {', '.join(VARIANTS)}")
    return c
