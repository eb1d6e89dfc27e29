"""Options of the section ``dataset``: the images."""

from utils.config.checkers import AUTO_ON_OFF, Bool, Choice, Float, Int
from utils.config.options import EXECUTION, IMPLIED, PLACE, Option
from utils.config.path_checkers import FilePath
from utils.data.specs import DATASETS

SIDE = Int(8, 1024, or_zero=True)  # of a square image

OPTIONS = {
    "dataset_name": Option(Choice(DATASETS, any_case=True), default="Digits", meaning="name of the data set"),
    "num_classes": Option(
        Int(2, or_zero=True), default=0, unit="classes", role=IMPLIED, meaning="classes of the data set; 0 = its own"
    ),
    "batch_size": Option(
        Int(1), default=128, unit="images", meaning="global batch: images per step over all processes"
    ),
    "num_workers": Option(
        Int(0, 1024), default=2, role=EXECUTION, meaning="loading workers per process (torchvision and ffcv loaders)"
    ),
    "data_root": Option(FilePath(), default="./data", role=PLACE, meaning="folder of the data"),
    "download": Option(
        Bool(), default=True, role=EXECUTION, meaning="download the data set if it is missing (never a tree of images)"
    ),
    "loader": Option(
        Choice(["auto", "memory", "torchvision", "ffcv"]),
        default="auto",
        role=IMPLIED,
        meaning="memory: padded crops, own statistics; others: resized crops, ImageNet statistics; "
        "auto = memory for small images, torchvision for large ones",
    ),
    "augment": Option(
        Choice(["auto", "none", "flip", "crop", "crop_flip"]),
        default="auto",
        meaning="augmentation of training images; auto = the data set's usual recipe",
    ),
    "alternate_flip": Option(
        Bool(),
        default=False,
        meaning="draw flips once per level; invert all of them in each epoch (sets held in memory)",
    ),
    "validation_images": Option(
        Int(0),
        default=0,
        unit="images",
        meaning="training images held out for validation, the same ones in every run, as many of each class as its "
        "size asks for; 0 = none",
    ),
    "mixup": Option(
        Float("[0,]"),
        default=0.0,
        meaning="alpha of mixup: pairs of a batch blended, lambda ~ Beta(alpha, alpha) per step; 0 = off; "
        "with cutmix, each step takes one of the two",
    ),
    "cutmix": Option(
        Float("[0,]"),
        default=0.0,
        meaning="alpha of CutMix: a box of each image is its partner's; 0 = off (mixup, cutmix: not the ffcv loader)",
    ),
    "random_erasing": Option(
        Float("[0, 1]"),
        default=0.0,
        unit="probability",
        meaning="erase a rectangle of a training image, of 2% to 33% of its area (memory and torchvision loaders)",
    ),
    "randaugment": Option(
        Int(0, 30),
        default=0,
        unit="magnitude",
        meaning="RandAugment: 2 random operations of this strength per training image (torchvision loader); 0 = off",
    ),
    "drop_last": Option(Bool(), default=False, meaning="leave out the last batch of an epoch if it is short"),
    "resolution": Option(SIDE, default=0, unit="pixels", meaning="side of training images; 0 = the data set's own"),
    "eval_resolution": Option(SIDE, default=0, unit="pixels", meaning="side of test images; 0 = same as resolution"),
    "start_resolution": Option(
        SIDE, default=0, unit="pixels", meaning="first side in progressive resizing (ffcv only); 0 = off"
    ),
    "end_resolution": Option(
        SIDE, default=0, unit="pixels", meaning="last side in progressive resizing (ffcv only); 0 = off"
    ),
    "os_cache": Option(
        Choice(AUTO_ON_OFF),
        default="auto",
        role=EXECUTION,
        meaning="keep .beton files in the page cache (ffcv only); auto = if they take under 80% of free memory",
    ),
    "train_beton": Option(
        FilePath(optional=True), default="", role=PLACE, meaning='training .beton (ffcv only); "" = look in data_root'
    ),
    "val_beton": Option(
        FilePath(optional=True), default="", role=PLACE, meaning='test .beton (ffcv only); "" = look in data_root'
    ),
}
