"""Every key of a classification run, its default and its meaning."""

from __future__ import annotations

from fvcore.common.config import CfgNode

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def default_config() -> CfgNode:
    """Return a fresh tree of all keys with their defaults.

    The sections ``DISTILL.<NAME>`` come in by :func:`pcka.engine.distill.merge_settings`.
    """
    cfg = CfgNode(
        {
            "SEED": 0,  # of the student's start, the image order and the augmentation
            "OUTPUT_DIR": "output/run",  # everything that a run writes lies in this folder
            "DEVICE": "auto",  # auto (CUDA where there is one) | cpu | cuda
            "CHANNELS_LAST": False,  # memory format of images, student and teacher
            "AUTOCAST": "",  # "" (float32) | bfloat16 | auto: bfloat16 where the hardware has it
            "COMPILE": False,  # torch.compile of both models: minutes at the start, faster steps
            "CUDA_GRAPH": True,  # CUDA: record the step once and replay it, where it can be
            "LOG_EVERY": 20,  # steps between two reads of the losses (each one a synchronisation)
            "EVAL_EVERY": 1,  # epochs between two evaluations; the last epoch has one
            "SAVE_EVERY": 1,  # epochs between two checkpoints to resume from; likewise
        }
    )
    cfg.DATA = CfgNode(
        {
            "NAME": "",  # digits | folder | cifar10 | cifar100
            "ROOT": "data",  # folder of the images; digits needs none
            "NUM_CLASSES": 0,  # 0: as many as the data has; another count is refused
            "IMAGE_SIZE": 32,  # side of the square images, pixels
            "TRAIN_IMAGES": 0,  # 0: all; else a class-balanced subset of this many
            "HOLDOUT": 0,  # > 0: this many training images are held out and evaluated on (tuning)
            "SPLIT_SEED": 0,  # of the choice of HOLDOUT and TRAIN_IMAGES, apart from SEED
            "CROP_PADDING": 4,  # zero padding of the random crop, pixels; 0: none (not for STREAM)
            "FLIP": True,  # random horizontal flip
            "DOWNLOAD": False,  # cifar10 and cifar100: fetch what is missing
            "MEMORY_GB": 8.0,  # images are resident as uint8; a larger set is refused
            "STREAM": False,  # read the files of a folder batch by batch; RandomResizedCrop
            "WORKERS": 4,  # STREAM: decoding processes of each training process; 0: itself
            "RESIZE": 0,  # evaluating a folder: shorter side before the crop; 0: IMAGE_SIZE
        }
    )
    cfg.STUDENT = CfgNode(
        {
            "NAME": "",  # a name of classification.models.model_names()
            "WEIGHTS": "",  # checkpoint to start from; "": a random start from SEED
            "PIXEL_MEAN": IMAGENET_MEAN,  # of the student's input, for pixels in [0, 1]
            "PIXEL_STD": IMAGENET_STD,
        }
    )
    cfg.TEACHER = CfgNode(
        {
            "NAME": "",  # "": no teacher
            "WEIGHTS": "",  # the teacher's checkpoint
            "PIXEL_MEAN": IMAGENET_MEAN,  # the teacher's own pixel statistics
            "PIXEL_STD": IMAGENET_STD,
            "ACCURACY": 0.0,  # on the evaluation images, percent; one 2 points worse stops the run
            "TRAIN": False,  # with empty WEIGHTS: train the teacher first (CE), keep it for reuse
            "EPOCHS": 240,  # of that training; all else as in SOLVER
            "SEED": 0,  # of that training, so that runs of several SEEDs share a teacher
            "CACHE_DIR": "output/teachers",  # trained teachers, named by what determines them
        }
    )
    cfg.SOLVER = CfgNode(
        {
            "EPOCHS": 240,
            "BATCH_SIZE": 64,  # an incomplete last batch of an epoch is left out
            "BASE_LR": 0.05,
            "MOMENTUM": 0.9,
            "NESTEROV": False,
            "WEIGHT_DECAY": 5e-4,
            "SCHEDULE": "multistep",  # multistep | cosine (to 0 at EPOCHS); set at every step
            "MILESTONES": [150, 180, 210],  # epochs after which the rate is multiplied by GAMMA
            "GAMMA": 0.1,
            "WARMUP_EPOCHS": 0.0,  # the rate rises linearly from 0 over these epochs
        }
    )
    cfg.DISTILL = CfgNode(
        {
            "METHODS": ["CE"],  # the losses that are summed
            "WARMUP": 0.0,  # share of EPOCHS over which the terms that need the teacher rise from 0
            "TAPS": [],  # [name, student's module path, teacher's], beside the models' own stages
        }
    )
    return cfg
