"""Every setting of the built-in parts, with its default, unit and source. Imports nothing heavy.

A section with a choice carries `name`; the class here whose `name` has that default is its schema. Someone else's
part (a dotted import path) brings its own `Config` beside the class. Defaults are the published recipe; the files in
`configs/` say what differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

IMAGENET = 1_281_167  # pictures in the training set; published schedules are stated in its epochs

# ---------------------------------------------------------------------------------------------------------- data


@dataclass
class DataSettings:
    """What every data set has."""

    name: str = MISSING
    image_size: int = 256  # pixels, side of the square picture
    crop: Literal["center", "random"] = "center"  # training crop; random: shorter side to 1.5 x, then a random square
    flip: bool = False  # random horizontal flip in training
    limit: int | None = None  # use only so many pictures of each split, a fair sample of it


@dataclass
class ShapesSettings(DataSettings):
    """Procedural scenes, drawn on the fly."""

    name: str = "shapes"
    image_size: int = 64
    train: int = 20_000  # scenes in the split
    val: int = 1_000
    test: int = 2_000
    seed: int = 0
    max_objects: int = 4  # 2 to 5
    textured: float = 0.5  # share of scenes with a textured background
    label: Literal["shape", "colour", "count"] = "shape"  # shape or colour of the large object; number of objects
    questions: int = 6  # tried per scene; those without one clear answer are left out


@dataclass
class FolderSettings(DataSettings):
    """Class sub-folders, or one flat folder of pictures."""

    name: str = "folder"
    root: str = ""  # has train/ val/ test/ sub-folders, or is split by `holdout`
    holdout: float = 0.1  # share of pictures for val and again for test, where root has no such sub-folders
    seed: int = 0  # of that split


@dataclass
class HubSettings(DataSettings):
    """A Hugging Face data set id, or local parquet / arrow / webdataset shards."""

    name: str = "hub"
    path: str = ""  # hub id, folder, or glob of shards
    config: str | None = None  # the data set's own configuration name
    revision: str | None = None
    streaming: bool = False
    split_train: str = "train"
    split_val: str = "validation"
    split_test: str = "test"
    columns: dict[str, str] = field(default_factory=dict)  # ours -> theirs, e.g. {image: img, label: fine_label}
    shuffle_buffer: int = 10_000  # streaming only, pictures the train split is mixed within
    seed: int = 0  # of that mixing


@dataclass
class EasyVQASettings(DataSettings):
    """The easy-VQA data set from its wheel: 64 px, one shape a picture."""

    name: str = "easy_vqa"
    image_size: int = 64
    holdout: float = 0.1  # share of the training pictures that becomes val


# -------------------------------------------------------------------------------------------------------- latents


@dataclass
class LatentSettings:
    name: str = MISSING
    normalizer: Literal["none", "scalar", "channel", "position", "sphere"] = "position"
    stats: str | None = None  # an official stat.pt or a cache's stats.safetensors; None: measured on the training data
    stats_images: int = 50_000  # pictures to measure on where no cache holds exact statistics
    encode_batch: int = 64  # pictures per encoder call when a data set is encoded


@dataclass
class EncoderSettings(LatentSettings):
    """Frozen patch tokens after a LayerNorm without affine (RAE, arXiv 2510.11690), one space a kind of encoder."""

    weights: str = MISSING  # hub id, local folder, or asset:<name> (umm assets list)
    revision: str | None = None
    image_size: int = 256  # pixels of the picture the latent stands for
    encoder_size: int | None = None  # pixels the encoder sees; None: one token for each 16 px of the picture
    layers: list[int] = field(default_factory=lambda: [-1])  # blocks, each normed, averaged (RAEv2); [-1] is RAE
    mean_token: bool = False  # add the last block's mean token to every token (RAEv2's code on DINOv3 and SigLIP 2)


@dataclass
class DINOv2Settings(EncoderSettings):
    name: str = "dinov2"
    weights: str = "facebook/dinov2-with-registers-base"


@dataclass
class DINOv3Settings(EncoderSettings):
    name: str = "dinov3"
    weights: str = "facebook/dinov3-vitb16-pretrain-lvd1689m"  # gated: Meta's licence


@dataclass
class SigLIP2Settings(EncoderSettings):
    name: str = "siglip2"
    weights: str = "google/siglip2-base-patch16-256"  # of a fixed resolution; SigLIP 1 is read too


@dataclass
class CLIPSettings(EncoderSettings):
    name: str = "clip"
    weights: str = "openai/clip-vit-base-patch16"
    layers: list[int] = field(default_factory=lambda: [-2])  # nothing has trained the last block's patch tokens


@dataclass
class MAESettings(EncoderSettings):
    name: str = "mae"
    weights: str = "facebook/vit-mae-base"


@dataclass
class TimmSettings(EncoderSettings):
    name: str = "timm"
    weights: str = "vit_base_patch16_224.augreg2_in21k_ft_in1k"  # name of any timm ViT, or a folder in timm's layout


@dataclass
class VAESettings(LatentSettings):
    """A VAE of diffusers' AutoencoderKL family: a published one, or one of `widths` trained here."""

    name: str = "vae"
    weights: str | None = None  # hub id or folder in diffusers' layout, or a finished recon run; None: untrained
    subfolder: str | None = None  # of the hub's repository, e.g. vae
    revision: str | None = None
    image_size: int = 256
    # scalar: the published scaling and shift factors; channel: the published means and deviations where there are such;
    # else measured on the training data, as everywhere
    normalizer: Literal["none", "scalar", "channel", "position", "sphere"] = "scalar"
    posterior: Literal["mean", "sample"] = "mean"  # sample: one draw a picture, seeded by its pixels
    channels: int = 4  # this and the rest for weights=null only
    widths: list[int] = field(default_factory=lambda: [32, 64, 128, 128])  # channels of a level, each half the size
    blocks: int = 1  # residual blocks a level
    kl: float = 1e-6  # weight of the KL's sum over a latent, beside losses that are means over pixels


@dataclass
class PretrainedSettings:
    """The pretrained encoder inside a space that trains networks of its own."""

    name: str = "dinov2"  # a latent space of a frozen encoder
    weights: str = "facebook/dinov2-with-registers-base"
    revision: str | None = None
    encoder_size: int | None = None
    layers: list[int] = field(default_factory=lambda: [-1])


@dataclass
class ConvDecoderSettings:
    """Convolutional decoder of latent diffusion, as published for f16."""

    width: int = 128  # channels, times
    multipliers: list[int] = field(default_factory=lambda: [1, 1, 2, 2, 4])  # finest level first, each twice the next
    blocks: int = 2  # residual blocks a level, and one more
    attention: bool = True  # in the coarsest level; in its middle there always is one


@dataclass
class TrainedSettings(LatentSettings):
    """What spaces that train networks of their own have in common: see umm/latents/_trained.py."""

    weights: str | None = None  # a finished recon run of this space, whose other settings then hold; None: untrained
    image_size: int = 256  # pixels of the picture the latent stands for
    normalizer: Literal["none", "scalar", "channel", "position", "sphere"] = "channel"
    encoder: PretrainedSettings = field(default_factory=PretrainedSettings)


@dataclass
class SVGSettings(TrainedSettings):
    """Frozen tokens and a residual of detail (SVG, arXiv 2510.15301)."""

    name: str = "svg"
    tokens: Literal["features", "raw"] = "features"  # after the encoder's final norm, or as latents of encoder.name
    scalars: Literal["frozen", "batch"] = "frozen"  # batch: as published, a latent then depends on its batch
    channels: int = 8  # of the residual
    width: int = 384  # of the residual encoder, a ViT
    depth: int = 6
    heads: int = 8
    mlp: int = 1536
    drop: float = 0.1  # share of training pictures drawn without the residual
    decoder: ConvDecoderSettings = field(default_factory=ConvDecoderSettings)


@dataclass
class AlignTokSettings(TrainedSettings):
    """An encoder tuned in three stages (AlignTok, arXiv 2509.25162)."""

    name: str = "aligntok"
    adapter: Literal["mlp", "linear", "identity"] = "mlp"
    channels: int = 32  # of the latent, but for identity
    hidden: int = 1024  # of the mlp
    anchor: float = 1.0  # weight of the mean squared distance to the latents of the first stage
    late_lr: float = 0.1  # times recon.optim.lr in tune and refine
    lengths: list[float] = field(default_factory=lambda: [1.0, 1.0, 1.0])  # align, tune, refine; relative
    decoder: ConvDecoderSettings = field(default_factory=ConvDecoderSettings)


@dataclass
class PyramidSettings:
    """Decoder of VFM-VAE: a picture at every scale."""

    width: int = 512  # channels of a level at most,
    budget: int = 32_768  # and this many over its rows
    style: int = 512  # numbers of the style
    blocks: int = 3  # styled ConvNeXt blocks a level
    attention: int = 2  # levels with attention, from the coarsest on
    injected: int = 4  # levels that see the latent again


@dataclass
class VFMVAESettings(TrainedSettings):
    """Several depths of a frozen encoder through a Gaussian bottleneck (VFM-VAE, arXiv 2510.18457)."""

    name: str = "vfm_vae"
    levels: list[int] = field(default_factory=lambda: [0, 5, -1])  # blocks, the deepest last
    level_width: int = 64  # channels that a level is projected to
    merge: int = 1  # encoder positions along the side of a latent one
    channels: int = 32
    kl: float = 1e-6  # weights of the losses: of the KL's sum,
    vf: tuple[float, float] = (5.0, 1.0)  # of the alignment to the frozen features until and while relaxing,
    adaptive: bool = True  # which are in units of the reconstruction's gradient over its own,
    scales: float = 0.1  # of the coarser pictures while warming,
    ssim: float = 1.0  # of 1 - SSIM while refining
    equivariance: float = 0.5  # share of micro-batches drawn shrunk and turned
    lengths: list[float] = field(default_factory=lambda: [5.0, 15.0, 20.0, 1.0])  # warm, align, relax, refine
    decoder: PyramidSettings = field(default_factory=PyramidSettings)


@dataclass
class PixelsSettings(LatentSettings):
    """Square patches of pixels as tokens: no encoder at all, the control of every comparison."""

    name: str = "pixels"
    image_size: int = 256
    patch: int = 16  # pixels along a token's side


@dataclass
class PCASettings(LatentSettings):
    """The leading principal components of another space's tokens."""

    name: str = "pca"
    normalizer: Literal["none", "scalar", "channel", "position", "sphere"] = "scalar"  # keeps the components' sizes
    image_size: int = 256  # of the base too
    components: int = 64  # channels kept
    base: dict[str, Any] = field(default_factory=dict)  # settings of that space: {name: dinov2, layers: [-1]}
    basis: str | None = None  # pca.safetensors of umm diagnose on that space; a saved model holds its own


# ---------------------------------------------------------------------------------------------------------- cache


@dataclass
class CacheSettings:
    """The latent cache a run reads. Without `dir` the encoder runs in every step."""

    dir: str | None = None  # made on first use, refused when made otherwise; auto: a folder of UMM_CACHE by content
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"  # of the stored latents
    pictures: bool = True  # keep the uint8 pictures beside the latents (reconstruction needs them)
    flip: bool = False  # also store the mirrored picture
    shard_size: int = 4096  # pictures a shard


# ---------------------------------------------------------------------------------------------------------- optim


@dataclass
class OptimSettings:
    """AdamW and a schedule counted in images."""

    lr: float = 2e-4
    final_lr: float = 2e-5  # reached at the last image of the schedule
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = IMAGENET  # images of linear warm-up from zero
    constant: int = 0  # images at the full rate after the warm-up
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    decay_images: int | None = None  # image count at which final_lr is reached; None: the end of the run
    clip: float = 0.0  # global gradient norm; 0: off


# ------------------------------------------------------------------------------------------------------- recon task


@dataclass
class DecoderSettings:
    """MAE-style ViT decoder; size B, L or XL as published, or S, Ti, or `custom` with the numbers below."""

    name: str = "decoder"
    size: Literal["Ti", "S", "B", "L", "XL", "custom"] = "XL"
    width: int | None = None  # custom only
    depth: int | None = None
    heads: int | None = None
    mlp: int | None = None
    output_size: int | None = None  # pixels; None: the picture size the latent stands for
    checkpoint_gradients: bool = False


@dataclass
class PerceptualSettings:
    """`lpips-vgg` and `lpips-alex` need torchvision's weights; `encoder` and `judge` features are to be had offline."""

    name: Literal["none", "lpips-vgg", "lpips-alex", "encoder", "judge"] = "lpips-vgg"
    weight: float = 1.0
    layers: list[int] = field(default_factory=lambda: [2, 5, 8, 11])  # blocks of the encoder, for `encoder`


@dataclass
class AdversarialSettings:
    """GAN on frozen ViT features (StyleGAN-T heads), adaptive weight (VQGAN, arXiv 2012.09841, eq. 7)."""

    weight: float = 0.75  # 0: no discriminator at all
    backbone: str = "hub:vit_small_patch8_224.dino"  # hub:<timm name>, a local file, or asset:<name>
    taps: list[int] = field(default_factory=lambda: [2, 5, 8, 11])  # blocks whose tokens feed a head; the last again
    input_size: int = 224  # pixels the backbone sees
    start_discriminator: int = 6 * IMAGENET  # images after which the discriminator trains
    start_generator: int = 8 * IMAGENET  # images after which the decoder hears it
    adaptive: bool = True
    max_adaptive: float = 1e4
    diffaug: list[str] = field(default_factory=lambda: ["translation", "color"])
    optim: OptimSettings = field(default_factory=OptimSettings)


@dataclass
class ReconSettings:
    """Stage 1: a decoder for a frozen latent space."""

    decoder: DecoderSettings = field(default_factory=DecoderSettings)
    l1: float = 1.0
    l2: float = 0.0
    perceptual: PerceptualSettings = field(default_factory=PerceptualSettings)
    adversarial: AdversarialSettings = field(default_factory=AdversarialSettings)
    noise: float = 0.8  # tau: the decoder trains on z + sigma * eps, in the encoder's own units
    noise_law: Literal["uniform", "half_normal"] = "uniform"  # sigma ~ U(0, tau) (code) or |N(0, tau^2)| (paper)
    optim: OptimSettings = field(default_factory=OptimSettings)
    ema: float = 0.9978  # per step


# --------------------------------------------------------------------------------------------- flow matching, sampling


@dataclass
class FlowSettings:
    """How a generator is trained to predict; t = 1 is noise (umm/flow.py). RAE; RAEv2's values where they differ."""

    prediction: Literal["velocity", "x", "noise"] = "velocity"  # RAEv2: x
    loss_space: Literal["velocity", "x"] = "velocity"  # where the error is squared
    t_eps: float = 0.05  # least divisor when an x or noise prediction becomes a velocity
    density: Literal["logit_normal", "uniform"] = "logit_normal"  # of the time before the shift
    mean: float = 0.0  # of logit t, logit_normal only
    std: float = 1.0
    truncate: float = 0.999  # times before the shift lie in [0, truncate]; RAEv2: 1
    shift: float | None = None  # None: sqrt(numbers in a latent / shift_base)
    shift_base: int = 4096


@dataclass
class GuidanceSettings:
    """base + scale (full - base): 0 is the base, 1 no guidance. RAE: auto, 1.42; RAEv2: internal, 1.78 on [0.1, 1]."""

    kind: Literal["none", "classifier_free", "auto", "internal"] = "none"
    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)  # closed, in shifted time; outside of it no guidance
    weak: str | None = None  # auto only: the run whose generator is guided away from


@dataclass
class SamplerSettings:
    """How samples are drawn."""

    method: Literal["euler", "heun", "sde"] = "euler"
    grid: Literal["full", "rae"] = "full"  # full: `steps` steps down to 0 (RAEv2); rae: `steps` points, one step fewer
    steps: int = 50
    diffusion: Literal["sigma", "sin2"] = "sigma"  # sde only: w(t) = noise * t, or noise * sin^2(pi t)
    noise: float = 1.0  # sde only
    guidance: GuidanceSettings = field(default_factory=GuidanceSettings)


# ------------------------------------------------------------------------------------------------------------ dit


@dataclass
class DiTSettings:
    """Diffusion transformer. The defaults are RAE's DiT^DH (arXiv 2510.11690); other published networks are

    LightningDiT (2501.01423): head_depth 0;
    DiT (2212.09748), SiT: head_depth 0, norm layer, mlp gelu, rope false, time sinusoid, patch 2 on VAE latents;
    RAEv2 (2605.18324): size custom (1440, 28, 20), conditioning tokens, sincos false, qk_norm true, base_depth 8.

    What the output stands for (velocity, x, noise) is the flow's business: `FlowSettings.prediction`.
    """

    name: str = "dit"
    size: Literal["S", "B", "L", "XL", "custom"] = "XL"
    width: int | None = None  # custom only
    depth: int | None = None
    heads: int | None = None
    head_depth: int = 2  # blocks of the wide head, modulated token by token; 0: no such head
    head_width: int = 2048
    head_heads: int = 16
    patch: int = 1  # latent positions along a token's side
    mlp_ratio: float = 4.0  # hidden width of the MLP over its width; SwiGLU takes two thirds of it
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"  # layer: without weight and bias
    qk_norm: bool = False  # RMS-normed queries and keys
    rope: bool = True  # 2-D rotary positions
    sincos: bool = True  # fixed 2-D sine-cosine positions added to the trunk's tokens
    time: Literal["fourier", "sinusoid"] = "fourier"  # random frequencies, or DiT's geometric ones at 1000 t
    conditioning: Literal["adaln", "tokens"] = "adaln"  # tokens: in context, no adaLN in the trunk (RAEv2)
    time_tokens: int = 4  # with conditioning tokens
    class_tokens: int = 8
    base_depth: int = 0  # trunk blocks before an auxiliary output, the guide of internal guidance; 0: none
    repa_depth: int = 0  # trunk blocks before the REPA projector (arXiv 2410.06940: 8); 0: none
    repa_dim: int | None = None  # width of the features to align with; None: channels of the latent
    repa_layers: int = 3  # of the projector, 2048 wide between; 1: a linear map
    checkpoint_gradients: bool = False  # recompute blocks in the backward pass instead of keeping activations


# ------------------------------------------------------------------------------------------------------- gen task


@dataclass
class RepaSettings:
    """Trunk tokens after `dit.repa_depth` blocks aligned by cosine with clean ones (REPA, arXiv 2410.06940, eq. 7)."""

    weight: float = 0.0  # REPA: 0.5; 0 with gen.dit.repa_depth: the misalignment is logged and trains nothing
    target: Literal["features", "latent"] = "features"  # an encoder's patch features (needs pictures), or raw latents
    encoder: PretrainedSettings | None = None  # whose features, e.g. DINOv2's for a VAE; None: the latent space's own


@dataclass
class GenSettings:
    """Stage 2: a diffusion transformer on a frozen latent space. Sampling is set in `eval.sampler`."""

    dit: DiTSettings = field(default_factory=DiTSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
    conditional: bool = True  # learn the classes of the data
    label_dropout: float = 0.1  # share of pictures trained on without their class: what classifier-free guidance needs
    base_weight: float = 1.0  # of the auxiliary output's loss, where dit.base_depth gives one
    repa: RepaSettings = field(default_factory=RepaSettings)
    decoder: str | None = None  # a recon run on the same latent space: draws the samples
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(
            warmup=0, constant=40 * IMAGENET, decay="linear", decay_images=800 * IMAGENET, clip=1.0
        )
    )
    ema: float = 0.9995  # per step


# ------------------------------------------------------------------------------------------------- und task, probes


@dataclass
class LinearSettings:
    """Classes from the mean token."""

    name: str = "linear"


@dataclass
class AttentiveSettings:
    """Classes from what one learned query gathers of all tokens."""

    name: str = "attentive"
    heads: int | None = None  # of the attention; None: each at least 64 channels wide
    width: int | None = None  # of the reader, behind a linear map of the tokens; None: as wide as they are, no such map


@dataclass
class VQASettings:
    """Closed-vocabulary question answering: question words look at the latent's tokens, then one answer is chosen."""

    name: str = "vqa"
    text: str = "words"  # words: learned here; asset:minilm, a hub id or a folder: a frozen transformers encoder
    width: int = 256
    heads: int = 4
    text_depth: int = 1  # blocks in which the question's words look at each other only
    depth: int = 3  # blocks in which they also look at the picture
    answers: int | None = 3129  # most frequent answers of the training set; None: all


@dataclass
class TinyLanguageSettings:
    """The language model that `llm.model=tiny` makes from the training set's own text: a Llama, words as tokens."""

    width: int = 128
    depth: int = 3
    heads: int = 4
    steps: int = 300  # of pretraining on captions and questions
    batch_size: int = 64  # texts
    lr: float = 3e-3


@dataclass
class LoRASettings:
    """Low-rank updates of all linear layers of the language model (arXiv 2106.09685), through peft."""

    rank: int = 32  # 0: none, the language model stays as it is
    alpha: int = 64
    start: int = 0  # images for which the projector trains alone (LLaVA's first stage)


@dataclass
class LLMSettings:
    """Latents through a projector into a causal language model, as LLaVA-1.5 does (arXiv 2310.03744)."""

    name: str = "llm"
    model: str = "HuggingFaceTB/SmolLM2-360M"  # hub id or local folder of any causal model; tiny: made here
    revision: str | None = None
    merge: int = 1  # latent positions along the side of one prefix token
    template: str = "{image}Question: {question}\nAnswer with a single word or phrase. Answer: {answer}"
    max_answer: int = 16  # tokens, end token included
    lora: LoRASettings = field(default_factory=LoRASettings)
    tiny: TinyLanguageSettings = field(default_factory=TinyLanguageSettings)


@dataclass
class UndSettings:
    """Understanding: a reader on latents, or a trunk that learns from the understanding loss alone; or questions."""

    kind: Literal["classify", "vqa", "llm"] = "classify"
    train: Literal["probe", "trunk"] = "probe"  # trunk: a DiT from scratch, read after one of its blocks
    reader: Literal["linear", "attentive"] = "linear"
    attentive: AttentiveSettings = field(default_factory=AttentiveSettings)
    dit: DiTSettings = field(default_factory=DiTSettings)  # trunk only, as are the next two
    block: int = -1  # 0-based, negative from the end; later blocks and the output stay untrained
    time: float = 0.0  # the trunk sees (1 - time) z + time noise, without a class
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-3, final_lr=0.0, warmup=0, clip=1.0))
    ema: float | None = None  # per step; None: no average
    limit: int | None = None  # learn from the first so many training pictures only; None: all
    vqa: VQASettings = field(default_factory=VQASettings)
    llm: LLMSettings = field(default_factory=LLMSettings)
    blind: bool = True  # vqa, llm: also train the same network without pictures, the number to beat


# --------------------------------------------------------------------------------------------------------- joint task


@dataclass
class JointWeights:
    """Of the parts' gradients, each clipped by itself, where they share parameters."""

    gen: float = 1.0
    und: float = 1.0
    recon: float = 1.0  # share=adapter only


@dataclass
class AdapterSettings:
    """A residual network on standardised latents, token by token, that keeps every token's length."""

    name: str = "adapter"
    hidden: int = 256  # channels of its hidden layers
    depth: int = 1  # hidden layers
    teacher: float = 1.0  # weight of the mean squared distance to the unadapted latents, whose variance is about 1
    flow: Literal["input", "both"] = "input"  # where gen's loss moves latents: as the noisy input, also as the target


@dataclass
class JointSettings:
    """Several tasks in one loop on one latent space.

    share=trunk: `und` reads a block of the DiT that `gen` trains (`gen.dit`, `und.block`, `und.time`), with one
    optimiser and one average for both. share=adapter: all parts read latents through one adapter, which `optim` moves;
    each part's networks follow the part's own optimiser, and `ema` averages all. share=nothing: every part has its own
    parameters and is trained as it would be alone. `train.images` and `train.batch_size` are those of each part.
    """

    parts: list[Literal["recon", "gen", "und"]] = field(default_factory=lambda: ["gen", "und"])
    share: Literal["trunk", "adapter", "nothing"] = "trunk"
    adapter: AdapterSettings = field(default_factory=AdapterSettings)  # share=adapter only
    weights: JointWeights = field(default_factory=JointWeights)
    balance: bool = False  # give the others' gradients the norm of the first part's at what is shared, then weigh
    stop: list[Literal["gen", "und", "recon"]] = field(default_factory=list)  # parts that do not move what is shared
    sequential: bool = False  # the parts one after another, in their order, each for an equal share of train.images
    twice: bool = False  # every part once more, in another order with other noise: more of the same, for comparison
    # what a part learns instead, for comparison: gen's latents with their tokens mixed, or Gaussian noise of the same
    # moments; und's labels handed to other pictures
    placebo: Literal["none", "shuffled_tokens", "gaussian", "permuted_labels"] = "none"
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=2e-4, final_lr=2e-5, warmup=0, clip=1.0))
    ema: float | None = 0.9995  # per step


@dataclass
class ProbeSettings:
    """python -m umm.probe classify; the linear probe and kNN are DINOv2's (arXiv 2304.07193), but for augmentation."""

    split: Literal["val", "test"] = "test"  # judged on; nothing is ever chosen on it
    holdout: float = 0.1  # share of the training pictures on which learning rate and variant are chosen
    subsets: list[str] = field(default_factory=lambda: ["all"])  # of the rest: all, 5-shot (pictures a class), 10%
    dtype: Literal["float16", "float32"] = "float16"  # of the stored features
    baselines: bool = True  # the same probes on raw pixels and on an encoder with random weights
    batch_size: int = 128
    steps: int = 12_500  # of the linear probe
    rates: list[float] = field(  # SGD, momentum 0.9, cosine to 0, each times batch_size / 256: one classifier each
        default_factory=lambda: [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
    )
    standardise: bool | None = None  # features to mean 0, variance 1 first; None: those that no layer norm ended
    neighbors: int = 20
    temperature: float = 0.07
    token_steps: int = 5_000  # of the probes that read all tokens: attentive, segmentation
    token_rates: list[float] = field(default_factory=lambda: [1e-4, 3e-4, 1e-3, 3e-3])  # AdamW, cosine to 0
    token_decay: float = 0.05  # its weight decay


# ------------------------------------------------------------------------------------------------------------ run


@dataclass
class TrainSettings:
    images: int = 16 * IMAGENET  # pictures to train on, repeats counted
    batch_size: int = 512  # pictures per optimiser step, over all processes and micro-batches
    accumulate: int = 1  # micro-batches per step
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = False
    workers: int = 4  # loader processes of each training process; 0: load in the training process
    log_every: int = 50  # steps
    sample_every: int = IMAGENET  # images between picture grids
    evaluate_every: int = 0  # images between evaluations on val while training; 0: none
    save_every: int = IMAGENET // 4  # images between checkpoints
    keep: int = 2  # newest checkpoints kept
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)  # log.jsonl always


@dataclass
class EvalSettings:
    split: Literal["val", "test"] = "val"
    images: int | None = None  # at most so many; None: the split
    batch_size: int = 64
    cached: bool = False  # gen, und: read the judged pictures' latents from a cache as `cache` says, made on first use
    metrics: list[str] = field(default_factory=lambda: ["psnr", "ssim", "lpips", "bands", "fd", "kid", "prdc"])
    features: list[str] = field(default_factory=lambda: ["inception"])  # spaces for the set metrics
    neighbors: int = 5  # k of precision, recall, density, coverage
    bootstrap: int = 1000  # resamples for the confidence intervals
    baselines: bool = True  # also the PSNR of the mean training picture, and of the decoder before training
    lpips: Literal["alex", "vgg"] = "alex"


@dataclass
class GenEvalSettings(EvalSettings):
    """As many samples are drawn as there are pictures to compare with, their labels balanced."""

    metrics: list[str] = field(default_factory=lambda: ["fd", "kid", "prdc", "mind", "nearest"])
    features: list[str] = field(default_factory=lambda: ["inception", "dinov2"])
    train_images: int = 10_000  # training pictures that probe and nearest neighbours are taken from, at most
    noises: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.4, 0.8])  # on standardised latents, decoded
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
