"""What a run is told: frozen dataclasses, one sentence under each field (it is the help text of the flag).

The defaults are the recipe of the published runs (section 8 of the method); on the command line of p3b a recipe chooses what
is not given (`p3b.run.recipes`). Nothing here imports torch, so that `--help` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from p3b.run.augment_options import AugmentOptions

AT_ONCE = "at-once"
"""The --prune-schedule in which nothing is masked before the cut."""


@dataclass(frozen=True)
class RecipeOptions:
    """Recipe."""

    recipe: Literal["auto", "small", "paper"] = "paper"
    """How settings that are not given are chosen. auto: from images, classes, model and machine, each with its reason; small:
    fixed values for a few hundred images; paper: the defaults shown here, those of the published runs."""
    reasons: Annotated[Mapping[str, str], tyro.conf.Suppress, tyro.conf.Fixed] = field(default_factory=dict)
    """Why the settings that were chosen are what they are, by name."""


@dataclass(frozen=True)
class DataOptions:
    """Images."""

    data_set: str = "FOLDER"
    """CIFAR10, CIFAR100, IMNET, INAT18, INAT19, IFOOD, DIGITS, FOLDER (class folders, tars), or timm's hfds/..., torch/..."""
    data_path: Path | None = None
    """Where it lies: a folder or tar with train and val (or test), or class folders directly."""
    val_path: Path | None = None
    """Folder or tar of class folders to choose the best epoch on."""
    test_path: Path | None = None
    """Folder or tar of class folders for the final figures; never used to choose."""
    val_share: float | None = None
    """Share of the training images cut off for validation, in [0, 1); by default 0.1 for FOLDER without a val part, else 0."""
    max_train_images: int | None = None
    """Train on at most so many images, chosen by seed, the same number of each class."""
    download: bool = False
    """Fetch the data set if it is not there (CIFAR10, CIFAR100, torch/...)."""
    skip_unreadable: bool = False
    """Skip and count images that cannot be read, instead of stopping at the first."""
    num_workers: int | None = None
    """Processes that decode and augment; by default what fits the machine."""
    cache: str = "auto"
    """Keep images in memory once they are decoded: auto (if all fit a quarter of what is free), off, or gigabytes to use."""


@dataclass(frozen=True)
class ModelOptions:
    """Model."""

    model: str = "deit_small_patch16_224"
    """Name of a timm VisionTransformer."""
    model_path: Path | None = None
    """Weights to start from: a file or hub folder of timm, Hugging Face, torchvision, CLIP..., or a model that p3b saved."""
    model_pretrained: bool = False
    """Start from timm's pretrained weights of that name (downloaded): the default of p3b where no --model-path is given;
    --from-scratch starts from random ones."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments of timm's VisionTransformer, e.g. img_size=32 patch_size=4."""
    input_size: int | None = None
    """Side of the input image in pixels; the same as --model-kwargs img_size=N."""
    mean: tuple[float, ...] | None = None
    """Channel means for normalisation, in [0, 1]; by default as the weights say, else a guess that is logged."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations for normalisation; by default those of the pretrained model."""
    crop_pct: float | None = None
    """Evaluation resizes to the input size over this, then crops the centre; by default as a saved model says, else 0.875."""
    drop_path: float = 0.1
    """Stochastic depth rate of the last block in training, in [0, 1)."""
    resize_model_by_checkpoint: bool = False
    """Take the (small) shape of the model from --model-path, which must be one that p3b saved."""


@dataclass(frozen=True)
class TrainingOptions:
    """Training."""

    epochs: int = 300
    """Epochs of this stage; with `p3b prune` 0 is one shot: a trained model is cut as it is."""
    batch_size: int = 64
    """Images of a batch on each process."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    opt: str = "adamw"
    """timm's name of the optimizer."""
    lr: float = 5e-4
    """Learning rate for a global batch of 512; scaled with batch size x processes x accumulation."""
    min_lr: float = 1e-5
    """Where the cosine schedule ends."""
    warmup_epochs: int = 0
    """Epochs of linear learning-rate warm-up at the start of a cosine schedule."""
    weight_decay: float = 0.05
    """Weight decay of matrices; none on biases, norms and tokens."""
    layer_decay: float | None = None
    """Learning rate of a layer as a share of the next one's towards the head, in (0, 1]; None: all layers alike."""
    class_balance: Literal["none", "sqrt", "inverse"] = "none"
    """Weight of a class in the loss: none: each image counts alike; inverse: each class (1 / images); sqrt: in between."""
    clip_grad: float | None = None
    """Clip the gradient's norm to this."""
    smoothing: float = 0.1
    """Label smoothing, in [0, 1)."""
    mixup: float = 0.8
    """Mixup strength alpha; 0 is off."""
    cutmix: float = 1.0
    """Cutmix strength alpha; 0 is off."""
    precision: str = "auto"
    """fp32, bf16, fp16 (autocast), or auto: bf16 where the hardware multiplies it natively."""
    compile: bool = False
    """Train with torch.compile: faster steps, after a minute or more of compiling at the start and when masks first close."""
    small_form: Literal["saved", "quick"] = "saved"
    """Form that a small model trains in on a CPU: saved, or quick (the same function in fewer operations; results differ by
    rounding alone, and what is saved is the same)."""
    model_ema: bool = False
    """Evaluate and keep an exponential moving average of the weights."""
    model_ema_decay: float = 0.9999
    """Decay of the moving average per optimizer step, in (0, 1)."""
    distillation_type: str = "none"
    """none, soft (KL divergence) or hard (the teacher's label); with --distill-from soft, unless it is hard."""
    distillation_alpha: float = 0.5
    """Weight of the teacher, in [0, 1]."""
    distillation_tau: float | None = None
    """Temperature of soft distillation; by default 1 with --teacher-model, 2 with --distill-from."""
    teacher_model: str | None = None
    """timm name of the teacher (pretrained weights are downloaded unless --teacher-path is given)."""
    teacher_path: Path | None = None
    """Weights of the teacher, for the same classes."""


@dataclass(frozen=True)
class PhaseOptions:
    """Pruning, alike for every method."""

    prune_blocks_only: bool = False
    """Count the budget over the blocks alone, without embeddings, final norm and head."""
    prune_start_epoch: str = "5"
    """End of the warm-up: epochs (5), optimizer steps (500steps) or a share of the pruning epochs (20%)."""
    prune_sparse_epoch: str | None = None
    """When keep ratios have reached their goals; by default three eighths of the way from start to finalize."""
    prune_finalize_epoch: str | None = None
    """When the model is shrunk; by default after the last epoch."""
    prune_steps_update_mask: int | None = None
    """Mini-batches between two mask updates, a third of an epoch where that is shorter; by default a third of an epoch."""
    prune_update_every: str | None = None
    """The same in optimizer steps (30steps), epochs (2) or a share of the pruning epochs (5%), however short an epoch is."""
    prune_masks: Literal["soft", "hard"] = "soft"
    """soft: masks sharpen towards the end, what is pruned still gets a gradient and may return; hard: 0 or 1 from the first
    update on, for comparison. Those of wdpruning and savit are hard anyway."""
    prune_schedule: Literal["gradual", "at-once"] = "gradual"
    """gradual: masks close step by step while the model trains, as published; at-once: nothing closes before
    --prune-start-epoch, then the model is measured, cut and compensated in one shot, and other epochs are the small model's."""
    prune_compute: Literal["full", "active"] = "full"
    """full: every element is computed until the model is shrunk; active: those whose mask is below 0.03 are not, so that steps
    get quicker as pruning goes on. Not with --compile, wdpruning or savit."""
    prune_benefit: str | None = None
    """How a block's benefit is measured: low_rank (narrow convolutions; the default), paper (as published, costly; the default
    under the published name block_pr), linear (linear probes on class and mean patch token), ridge (the same in closed form),
    subsampled (paper's, on part of the data), removal (without probes: what the loss would change by if the block went)."""
    calibration_images: int = 512
    """Training images that a cut in one shot is measured on, and that --compensate fits on."""
    compensate: Literal["auto", "on", "off"] = "auto"
    """Whether at the cut the weights that stay are fitted to make up for what goes; auto: in one shot, which
    is --epochs 0 or --prune-schedule at-once."""
    order_heads: bool = True
    """In one shot, order the channels of attention heads first, which changes nothing that the model computes."""
    prune_alpha: float = 0.5
    """Weight of the class token's benefit against the patches', in [0, 1]."""
    prune_gamma: float = 0.2
    """Weight of a new interval in the smoothed importance, in (0, 1]."""
    prune_benefit_scale: float = 10.0
    """Scale T of the benefits before they are squashed."""
    probe_lr: float = 5e-4
    """Learning rate of the probes, not scaled with the batch size."""
    wd_round_to: int = 1
    """With wdpruning, gates of so many elements keep a multiple of it; the log says what it costs; published: 16; 1 is off."""
    wd_classifiers: tuple[int, ...] = ()
    """Blocks, counted from 1, that wdpruning trains a classifier behind, so that the network may be cut there: 8 10.
    Published as --classifiers."""
    wd_classifier_choose: int | None = None
    """Which of them takes the place of the head: the network keeps so many blocks; by default it keeps all.
    Published as --classifier-choose."""
    wd_classifier_lr: float | None = None
    """Learning rate of these classifiers, not scaled with the batch size; by default 5e-4."""
    wd_lr: float | None = None
    """Learning rate of wdpruning's scores and thresholds; by default 0.0025, more where pruning is too short for it."""
    wd_lambda_lr: float = 10.0
    """Rate at which wdpruning's two Lagrange multipliers climb."""
    savit_every: int = 10
    """With savit, interactions are measured at every so many optimizer steps of the last two intervals between mask updates."""
    savit_images: int = 16
    """With savit, images of a batch that interactions are measured on; it costs about as much as five steps on them."""
    align: int = 1
    """Widths of the last masks (channels read, inner, written) are multiples of this, the budget being met all the same; where
    heads would be thinner than three quarters, whole heads go instead; 1 is off."""
    prune_stream: float | Literal["auto"] = 0.0
    """Share of the residual stream's channels that goes, in [0, 1), the same ones in the whole model, or auto: by the prune
    ratio; 0, as published: each block reads and writes some of them. A narrower stream makes quicker small models."""
    spare: tuple[str, ...] = ()
    """Blocks that keep all they have: blocks.0 (attention and MLP), blocks.11.mlp; the others give up more for it. Embeddings,
    final norm and head always stay."""
    layout: str = "auto"
    """How the small model is timed: index, padded, folded, gathered, zeros, balanced, reordered, or auto: measure."""
    finetune_epochs: int = 0
    """Epochs of fine-tuning the small model in the same go."""
    finetune_lr: float | None = None
    """Learning rate of that fine-tuning, scaled like --lr, which is the default."""
    distill_from: Literal["none", "warm-up", "dense-run"] = "none"
    """Learn from the model's own dense transfer, too, once the warm-up is over: warm-up (the model as it is then; its moving
    average with --model-ema) or dense-run (that of --dense-run; in a comparison or sweep the dense row)."""


@dataclass(frozen=True)
class PruneOptions(PhaseOptions):
    """Pruning."""

    prune_method: str = "block_benefit"
    """What decides how much of each block stays, and which elements:
    block_benefit: shares by block benefit (P3B, arXiv 2506.23675), published as block_pr;
    uniform: the same share of every block, elements by Taylor score;
    random: the same share of every block, random elements;
    magnitude: L2 norms of weights, ranked over the whole network (Li et al., ICLR 2017);
    taylor: squared Taylor scores, ranked over the whole network (Molchanov et al., CVPR 2019);
    wdpruning: learned widths of every layer, and depth where asked for (WD-Pruning, Yu et al., AAAI 2022);
    savit: whole heads, hidden channels and the residual stream, once, by their interactions (Zheng et al., NeurIPS 2022)."""
    prune_ratio: float = 0.5
    """Share of all parameters that goes, in [0, 1); --keep 0.3 is --prune-ratio 0.7."""
    prune_keep_ratios: tuple[float, ...] = ()
    """Keep ratios given by hand, one per block (attention, MLP, attention, ...); then nothing is measured to find them."""
    dense_run: Path | None = None
    """Output folder of a finished `p3b train` to compare with at the end, and the teacher of --distill-from dense-run."""


@dataclass(frozen=True)
class MachineOptions:
    """Run."""

    output_dir: Path | None = None
    """Folder for everything that the run writes."""
    checkpoint_minutes: float = 10.0
    """Minutes between two checkpoints within an epoch, besides the one at its end; 0: none within an epoch."""
    timeout_minutes: float = 10.0
    """Minutes that a process waits for one that does not answer, before the run stops."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    dist_eval: bool = True
    """Share the evaluation among processes; off: every process evaluates all images."""
    figure_format: Literal["png", "svg"] = "png"
    """Format of the figures."""
    track: tuple[Literal["tensorboard", "wandb", "trackio", "none"], ...] = ()
    """Tools that are told of the run: tensorboard, wandb, trackio; by default TensorBoard, if it is installed; none."""
    report: bool = True
    """Write report.html at the end of a run: result, figures, classes, diagnosis; `p3b report` makes it at any time."""
    verbose: bool = False
    """Show details of the run too (-v); log.txt always has them."""
    quiet: bool = False
    """Show warnings and the final table only (-q); log.txt has everything."""


@dataclass(frozen=True)
class RunOptions(MachineOptions):
    """Run."""

    resume: bool = False
    """Go on from the last checkpoint of this stage in the output folder."""
    overwrite: bool = False
    """Remove what an earlier run of this stage left in the output folder."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class TrainConfig:
    """Dense transfer: train a ViT on a data set, nothing is pruned."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    run: RunOptions = field(default_factory=RunOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions, kw_only=True)


@dataclass(frozen=True)
class FinetuneConfig(TrainConfig):
    """Fine-tune a small (or any) model: cosine schedule."""


@dataclass(frozen=True)
class PruneConfig(TrainConfig):
    """Transfer and prune on the way: warm-up, sparsify, sharpen, finalize, and fine-tune where asked for."""

    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=50))
    prune: PruneOptions = field(default_factory=PruneOptions)

    @property
    def one_shot(self) -> bool:
        """Whether nothing is masked before the cut."""
        return self.training.epochs == 0 or self.prune.prune_schedule == AT_ONCE


@dataclass(frozen=True)
class CompareOptions:
    """Comparison."""

    methods: tuple[str, ...] = ()
    """Methods to compare, as in `p3b prune --prune-method`; by default all of them."""
    prune_ratios: tuple[float, ...] = (0.5,)
    """Shares of all parameters that go, each in [0, 1): every method is run at each."""
    seeds: tuple[int, ...] = (0,)
    """Seeds: everything is run with each, one after the other."""
    smaller: bool = True
    """Fine-tune a smaller ViT of the same number of parameters, too, at each ratio."""
    table_only: bool = False
    """Run nothing: make the table of what is done in the output folder."""


@dataclass(frozen=True)
class CompareConfig:
    """Methods x prune ratios x seeds on one data set, beside a dense and a smaller model; run it again to continue."""

    compare: CompareOptions = field(default_factory=CompareOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=50))
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    prune: PhaseOptions = field(default_factory=PhaseOptions)
    run: MachineOptions = field(default_factory=MachineOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions, kw_only=True)


@dataclass(frozen=True)
class SweepOptions:
    """Budgets: give either --prune-ratios or --max-loss."""

    prune_ratios: tuple[float, ...] = ()
    """Shares of all parameters that go, each in [0, 1): one small model is made for each."""
    max_loss: float | None = None
    """Search the largest share that may go at a loss of at most so many points of validation top-1 against the dense model."""
    lowest: float = 0.1
    """Of the search: the smallest share that is tried."""
    highest: float = 0.9
    """Of the search: the largest share that is tried."""
    ratio_step: float = 0.02
    """Of the search: distance of the shares that may be tried, and so how closely the answer is known."""
    dense_run: Path | None = None
    """Output folder of a finished `p3b train` to compare with; by default a dense model is trained for as many epochs."""
    prune_method: str = "block_benefit"
    """Method, as in `p3b prune --prune-method`."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class SweepConfig:
    """Several budgets from one warm-up, or the largest that loses at most so many points; run it again to continue."""

    sweep: SweepOptions = field(default_factory=SweepOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(epochs=50))
    augment: AugmentOptions = field(default_factory=AugmentOptions)
    prune: PhaseOptions = field(default_factory=PhaseOptions)
    run: MachineOptions = field(default_factory=MachineOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions, kw_only=True)


@dataclass(frozen=True)
class EvaluateConfig:
    """Accuracy, size and speed of a saved model on a data set."""

    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    batch_size: int = 64
    """Images of a batch on each process."""
    precision: str = "fp32"
    """fp32, bf16, fp16, or auto."""
    layout: str = "index"
    """How a small model is carried out: index, padded, folded, gathered, zeros, balanced, reordered, or auto: measure."""
    run: RunOptions = field(default_factory=RunOptions)


@dataclass(frozen=True)
class PlanOptions:
    """Plan."""

    budgets: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Prune ratios whose size and speed are shown beside the one that was asked for."""
    measured_steps: int = 3
    """Training steps that the time of a run is measured on."""
    look_at: int = 500
    """Images of each part that are opened to see what they are like, at most."""


@dataclass(frozen=True)
class PlanConfig(PruneConfig):
    """What `p3b prune` with these settings would do: data, recipe, time, and what budgets give. Nothing is trained."""

    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True)
class DataConfig:
    """What is in a folder of images: parts, classes, sizes, formats, unreadable and equal files, pictures that look alike."""

    data: DataOptions = field(default_factory=DataOptions)
    look_at: int = 2_000
    """Images of each part that are opened, at most."""
    seed: int = 0
    """Seed of the parts that are cut off."""


@dataclass(frozen=True)
class DemoConfig:
    """The whole job on data that comes with the project: printed letters to handwritten digits, at half the parameters."""

    output_dir: Path = Path("demo-run")
    """Folder for everything that the demo writes; what an earlier demo left there is replaced."""
    prune_ratio: float = 0.5
    """Share of all parameters that goes, in [0, 1)."""
    seed: int = 0
    """Seed of everything random."""


def to_plain(config: object) -> dict[str, Any]:
    """A config as plain JSON values, flat flag names under their groups."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value

    return plain(asdict(config))  # type: ignore[call-overload]
