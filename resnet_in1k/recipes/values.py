"""Values of the named recipes; published.py has the source and the accuracy of each."""

from dataclasses import replace

from resnet_in1k.recipes.recipe import Recipe

SGD = Recipe(
    model="resnet50",
    epochs=90,
    global_batch_size=256,
    lr=0.1,
    lr_batch_rule="linear",
    momentum=0.9,
    weight_decay=1e-4,
    image_size=224,
    hflip_probability=0.5,
)
"""What the recipes with SGD share."""

TUTORIAL = replace(
    SGD,
    epochs=20,
    lr_schedule="step",
    lr_step_epochs=5,
    lr_step_factor=0.2,
    rotation_degrees=10,
    brightness=0.2,
    contrast=0.2,
    saturation=0.2,
    hue=0.2,
)

DEMO = replace(
    TUTORIAL,
    zero_init_residual=True,
    epochs=10,
    global_batch_size=32,
    lr=0.02,
    lr_schedule="cosine",
    warmup_epochs=1,
    label_smoothing=0.1,
    image_size=32,
    eval_crop_ratio=1.0,
    crop_scale_min=0.75,
    hflip_probability=0.0,  # a mirrored digit is another sign
    hue=0.0,  # a gray digit has no hue
)

TV1 = replace(SGD, lr_schedule="multi_step", lr_milestones=(30, 60))

GOYAL = replace(
    SGD,
    zero_init_residual=True,
    global_batch_size=8192,
    lr=3.2,
    lr_schedule="multi_step",
    lr_milestones=(30, 60, 80),
    warmup_epochs=5,
    warmup_start_factor=1 / 32,  # from 0.1
    nesterov=True,
    decay_norms=False,
)

NV_90 = replace(
    SGD,
    global_batch_size=2048,
    lr=2.048,
    lr_schedule="cosine",
    warmup_epochs=8,
    momentum=0.875,
    weight_decay=2**-15,
    decay_norms=False,
    label_smoothing=0.1,
)

BUDGET_16 = replace(
    SGD,
    epochs=16,
    global_batch_size=4096,
    lr=1.7,
    lr_schedule="linear",
    warmup_epochs=2,
    warmup_start_factor=1e-4,
    decay_norms=False,
    label_smoothing=0.1,
    image_size=192,
    initial_image_size=160,
    image_size_ramp_start=12,
    image_size_ramp_end=14,
    eval_image_size=256,
)

MLPERF_LARS = replace(
    SGD,
    epochs=37,
    global_batch_size=3200,
    optimizer="lars",
    lr=11.0,
    lr_schedule="polynomial",
    lr_floor=1e-4,
    warmup_epochs=2,
    weight_decay=5e-5,
    decay_norms=False,
    decay_biases=False,
    label_smoothing=0.1,
    crop_scale_min=0.05,
)

TV2 = replace(
    SGD,
    epochs=600,
    global_batch_size=1024,
    lr=0.5,
    lr_schedule="cosine",
    warmup_epochs=5,
    warmup_start_factor=0.01,
    weight_decay=2e-5,
    decay_norms=False,
    label_smoothing=0.1,
    ema_decay=0.99998,
    ema_every_steps=32,
    publish="ema",
    image_size=176,
    repeated_augmentation=4,
    augment_policy="trivial_augment",
    random_erasing_probability=0.1,
    mixup_alpha=0.2,
    cutmix_alpha=1.0,
    eval_image_size=224,
    eval_crop_ratio=224 / 232,
)

A3 = Recipe(
    model="resnet50",
    zero_init_residual=True,
    epochs=100,
    global_batch_size=2048,
    loss="binary_cross_entropy",
    bce_target_threshold=0.2,
    optimizer="lamb",
    lr=8e-3,
    lr_batch_rule="sqrt",
    lr_schedule="cosine",
    lr_floor=1e-6,
    warmup_epochs=5,
    warmup_start_factor=1e-4 / 8e-3,
    weight_decay=0.02,
    decay_norms=False,
    decay_biases=False,
    max_grad_norm=1.0,
    image_size=160,
    train_interpolation="random",
    augment_policy="timm_rand_augment",
    rand_augment_magnitude=6,
    rand_augment_magnitude_std=0.5,
    hflip_probability=0.5,
    mixup_alpha=0.1,
    cutmix_alpha=1.0,
    eval_image_size=224,
    eval_crop_ratio=0.95,
    eval_interpolation="bicubic",
)

A2 = replace(
    A3,
    epochs=300,
    lr=5e-3,
    warmup_start_factor=1e-4 / 5e-3,
    stochastic_depth=0.05,
    image_size=224,
    repeated_augmentation=3,
    rand_augment_magnitude=7,
)

# Without the threshold, above which smoothed targets would be hard again.
A1 = replace(A2, epochs=600, weight_decay=0.01, label_smoothing=0.1, bce_target_threshold=0.0, mixup_alpha=0.2)

# Few steps: Muon, large updates from the first epoch on, small images first, crops that keep a third of the image.
SPRINT = replace(
    SGD,
    zero_init_residual=True,
    epochs=5,
    global_batch_size=64,
    optimizer="muon",
    lr=0.01,
    lr_batch_rule="sqrt",
    lr_schedule="cosine",
    warmup_epochs=0.5,
    nesterov=True,
    weight_decay=0.05,
    decay_norms=False,
    decay_biases=False,
    label_smoothing=0.1,
    ema_decay=0.99998,
    publish="ema",
    image_size=128,
    initial_image_size=64,
    image_size_ramp_start=1,
    image_size_ramp_end=4,
    crop_scale_min=0.35,
    hflip_probability=0.0,
    alternating_flip=True,
)

# Small steps for what the network knows, larger ones for the new last layer, which first learns alone.
FINETUNE = replace(
    SGD,
    epochs=10,
    global_batch_size=64,
    lr=0.01,
    lr_schedule="cosine",
    warmup_epochs=0.5,
    nesterov=True,
    decay_norms=False,
    head_lr_factor=10.0,
    freeze_epochs=1,
    label_smoothing=0.1,
    ema_decay=0.99998,
    publish="ema",
    crop_scale_min=0.35,
    hflip_probability=0.0,
    alternating_flip=True,
)

LINEAR_PROBE = replace(
    FINETUNE, lr=0.05, warmup_epochs=0.0, weight_decay=0.0, head_lr_factor=1.0, freeze_epochs=10, label_smoothing=0.0
)
