"""Complete training configurations by name: `knn-diffusion train PART --preset NAME`.

A preset's comment says what it is for, on what hardware it was run, how long it takes and what to expect; docs/log.md has
the measurements. Any field can be overridden with `--set a.b=value` or in a file given by `--config`.
"""

from __future__ import annotations

from knn_diffusion.diffusion.losses import LossConfig
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.models.denoiser import PAPER, DenoiserConfig
from knn_diffusion.models.tokenizer import PAPER as PAPER_TOKENIZER
from knn_diffusion.models.tokenizer import TokenizerConfig
from knn_diffusion.training.conditioning import ConditioningConfig
from knn_diffusion.training.denoiser import DenoiserRun
from knn_diffusion.training.encoder import EncoderRun
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.tokenizer import TokenizerLossConfig, TokenizerRun

ENCODERS: dict[str, EncoderRun] = {
    # The bundled encoder, from the published weights of EfficientNet-Lite0 (--set backbone=FOLDER, recipes/backbone.py): 2,600 steps of
    # 40 pairs at 1.05 s on one CPU core, 45 minutes.
    "stickers": EncoderRun(),
}

TOKENIZERS: dict[str, TokenizerRun] = {
    # The bundled tokenizer where no GPU is at hand: 1,400 steps at 0.9 s on one busy core, 21 minutes, PSNR 25.0;
    # it ends before the discriminator starts.
    "stickers-cpu": TokenizerRun(
        tokenizer=TokenizerConfig(codebook_decay=0.97, restart_share=0.3),
        training=TrainingConfig(
            num_steps=1400,
            batch_size=32,
            learning_rate=2e-3,
            final_learning_rate=1e-4,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            ema_decay=0.995,
            validate_every=250,
            checkpoint_every=250,
        ),
    ),
    # For one GPU, not run yet: wider, longer, and sharpened by the discriminator in the second half.
    "stickers-gpu": TokenizerRun(
        tokenizer=TokenizerConfig(channels=128, decoder_blocks=3, codebook_decay=0.97, restart_share=0.3),
        training=TrainingConfig(
            num_steps=10_000,
            batch_size=128,
            learning_rate=8e-4,
            final_learning_rate=2e-5,
            warmup_steps=500,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            ema_decay=0.999,
            validate_every=2000,
            checkpoint_every=1000,
            log_every=50,
        ),
        loss=TokenizerLossConfig(discriminator_start=4000, adversarial_start=5000),
    ),
    # Transparent stickers of 128 pixels, 32×32 tokens; 3,800 steps at 0.7 s on one CPU core, 47 minutes. PSNR on white 29.5 on
    # concepts and 25.1 on a family that it never saw; 99.7 % of the codes in use.
    "stickers": TokenizerRun(
        tokenizer=TokenizerConfig(
            image_size=128,
            grid=32,
            alpha=True,
            vocab_size=2048,
            patch=4,
            channels=128,
            channel_multipliers=(1,),
            decoder_blocks=3,
            restart_share=0.3,
        ),
        training=TrainingConfig(
            num_steps=3800,
            batch_size=8,
            learning_rate=1.5e-3,
            final_learning_rate=5e-5,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            ema_decay=0.998,
            validate_every=300,
            checkpoint_every=300,
        ),
        loss=TokenizerLossConfig(discriminator_start=2400, adversarial_start=2700),
    ),
    # The size of the paper's tokenizer (A.1), for photographs of 256 pixels; not run yet.
    "paper-photo": TokenizerRun(
        tokenizer=PAPER_TOKENIZER,
        training=TrainingConfig(
            num_steps=300_000, batch_size=64, learning_rate=2e-4, warmup_steps=2000, betas=(0.5, 0.9), weight_decay=0.0
        ),
        loss=TokenizerLossConfig(discriminator_start=80_000, adversarial_start=100_000),
    ),
}


def _denoiser(config: DenoiserConfig, training: TrainingConfig, **others: object) -> DenoiserRun:
    schedule = Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset="absorbing")
    return DenoiserRun(denoiser=config, schedule=schedule, training=training, **others)  # type: ignore[arg-type]


DENOISERS: dict[str, DenoiserRun] = {
    # The bundled model where no GPU is at hand: 64 pixels, 16×16 tokens; 100 minutes at 0.6 s a step on two cores. The judge
    # recognises 86 % of the objects among five, 94 % of the backgrounds, and 88 % of unseen concepts added to the index.
    "stickers-cpu": _denoiser(
        DenoiserConfig(
            vocab_size=1024,
            grid=16,
            width=256,
            depth=6,
            heads=4,
            condition_dim=512,
            num_steps=100,
            patch_size=2,
            query_dim=272,
            code_dim=16,
            map_width=96,
        ),
        TrainingConfig(
            num_steps=10_000,
            batch_size=32,
            learning_rate=1e-3,
            final_learning_rate=5e-5,
            warmup_steps=200,
            ema_decay=0.999,
            validate_every=500,
            checkpoint_every=500,
        ),
        loss=LossConfig(aux_weight=2e-2),
        conditioning=ConditioningConfig(query_dropout=0.2, query_noise=0.4),
    ),
    # Transparent stickers of 128 pixels, 32×32 tokens, neighbors' grids read, on a CPU; 14.5 M parameters, 29 MB. A step takes
    # 0.85 s on two quiet cores: three hours. Not run to its end yet; 1,380 steps draw blobs. Start it with
    # MALLOC_MMAP_THRESHOLD_=8589934592 and MALLOC_TRIM_THRESHOLD_=8589934592 in the environment, so that glibc keeps the memory
    # of large tensors.
    "stickers": _denoiser(
        DenoiserConfig(
            vocab_size=2048,
            grid=32,
            width=320,
            depth=8,
            heads=5,
            mlp_ratio=3,
            condition_dim=256,
            num_steps=100,
            patch_size=4,
            code_dim=16,
            local_width=96,
            local_blocks=2,
            grid_neighbors=4,
            grid_layers=4,
            copy_window=3,
        ),
        TrainingConfig(
            num_steps=9_000,
            batch_size=20,
            learning_rate=2e-3,
            final_learning_rate=5e-5,
            warmup_steps=200,
            optimizer="muon",
            ema_decay=0.999,
            validate_every=500,
            checkpoint_every=500,
        ),
        loss=LossConfig(aux_weight=4e-2, adaptive_aux=False),
        conditioning=ConditioningConfig(
            k=8,
            candidates=16,
            query_dropout=0.2,
            query_noise=0.3,
            neighbor_dropout=0.1,
            skip_nearest=0.1,
            shuffle_leader=0.1,
            style_leader=0.5,
            grid_dropout=0.05,
        ),
    ),
    # For one GPU, not run yet: the same tokens, one place of the transformer for each.
    "stickers-gpu": _denoiser(
        DenoiserConfig(
            vocab_size=1024,
            grid=16,
            width=384,
            depth=10,
            heads=6,
            condition_dim=512,
            num_steps=100,
            query_dim=272,
            code_dim=16,
            map_width=48,
        ),
        TrainingConfig(
            num_steps=24_000,
            batch_size=256,
            learning_rate=6e-4,
            final_learning_rate=2e-5,
            warmup_steps=1000,
            ema_decay=0.9995,
            validate_every=2000,
            checkpoint_every=1000,
            log_every=50,
        ),
        loss=LossConfig(aux_weight=2e-2),
        conditioning=ConditioningConfig(query_dropout=0.2, query_noise=0.4),
    ),
    # The paper's configuration (A.1-A.3) with VQ-Diffusion's optimizer, for many GPUs; not run yet.
    "paper-photo": DenoiserRun(
        denoiser=PAPER,
        schedule=Schedule(num_steps=PAPER.num_steps, vocab_size=PAPER.vocab_size, preset="released"),
        training=TrainingConfig(
            num_steps=1_000_000, batch_size=256, learning_rate=2e-4, warmup_steps=5000, ema_decay=0.9996, clip_norm=0.5
        ),
        conditioning=ConditioningConfig(condition_dropout=0.0),
        step_sampling="importance",
    ),
}
